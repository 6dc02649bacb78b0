# What rootless/init.py holds, and says why. To assemble it: as -o it.o supervisor-aarch64.s; objcopy -O binary -j .text it.o it
    .globl _start
_start:
    mov x8, #167            // prctl(PR_SET_NAME, name)
    mov x0, #15
    adr x1, name
    svc #0
    ldr w19, process        // the id of pid 1, filled in
    sub sp, sp, #32         // two struct pollfd, then the status
    ldr w1, go              // .events = 0: a hang-up is always reported
    str x1, [sp]
    ldr w1, pidfd
    orr x1, x1, #0x100000000 // .events = POLLIN
    str x1, [sp, #8]
again:
    mov x8, #73             // ppoll(fds, 2, NULL, NULL, 8)
    mov x0, sp
    mov x1, #2
    mov x2, #0
    mov x3, #0
    mov x4, #8
    svc #0
    cmp w0, #0
    b.le again
    ldrh w20, [sp, #6]      // go's revents: the parent is gone
    cbz w20, wait
    mov x8, #129            // kill(process, SIGKILL)
    mov w0, w19
    mov x1, #9
    svc #0
wait:
    mov x8, #260            // wait4(process, &status, 0, NULL)
    mov w0, w19
    add x1, sp, #16
    mov x2, #0
    mov x3, #0
    svc #0
    cbz w20, report
    mov x8, #221            // execve(argv[1], argv + 1, NULL): clean up in the parent's place
    ldr x0, [sp, #48]
    add x1, sp, #48
    mov x2, #0
    svc #0
report:
    ldr w1, [sp, #16]
    ubfx w0, w1, #8, #8     // its exit status
    ands w1, w1, #0x7f      // or the signal that ended it
    b.eq end
    add w0, w1, #128
end:
    mov x8, #94             // exit_group
    svc #0
process:
    .long 0x11111111
go:
    .long 0x11111111
pidfd:
    .long 0x11111111
name:
    .asciz "sbx-supervisor"
