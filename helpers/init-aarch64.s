# What rootless/init.py holds, and says why. To assemble it: as -o it.o init-aarch64.s; objcopy -O binary -j .text it.o it
    .globl _start
_start:
    mov x8, #167            // prctl(PR_SET_NAME, name)
    mov x0, #15
    adr x1, name
    svc #0
    ldr w19, command        // the command's id, filled in
    sub sp, sp, #16
next:
    mov x8, #137            // rt_sigtimedwait(all, NULL, NULL, 8)
    adr x0, all
    mov x1, #0
    mov x2, #0
    mov x3, #8
    svc #0
    cmp w0, #17             // SIGCHLD
    b.eq reap
    mov w1, w0              // kill(command, signal)
    mov w0, w19
    mov x8, #129
    svc #0
    b next
reap:
    mov x8, #260            // wait4(-1, &status, WNOHANG, NULL)
    mov x0, #-1
    mov x1, sp
    mov x2, #1
    mov x3, #0
    svc #0
    cmp w0, #0
    b.le next
    cmp w0, w19
    b.ne reap
    ldr w1, [sp]
    ubfx w0, w1, #8, #8     // its exit status
    ands w1, w1, #0x7f      // or the signal that ended it
    b.eq end
    add w0, w1, #128
end:
    mov x8, #94             // exit_group
    svc #0
    .balign 8
all:
    .quad -1
command:
    .long 0x11111111
name:
    .asciz "sbx-init"
