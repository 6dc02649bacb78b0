# What rootless/init.py holds, and says why. To assemble it: as -o it.o start-aarch64.s; objcopy -O binary -j .text it.o it
    .globl _start
_start:
    mov x8, #167            // prctl(PR_SET_DUMPABLE, 0)
    mov x0, #4
    mov x1, #0
    svc #0
    mov x8, #25             // fcntl(status, F_SETFD, FD_CLOEXEC)
    ldr w0, status
    mov x1, #2
    mov x2, #1
    svc #0
    cbnz w0, end            // no status: a file of the sandbox had us executed once more
    ldr x9, [sp]            // argc, argv, NULL, envp
    mov x8, #221            // execve(argv[1], argv + 2, envp)
    ldr x0, [sp, #16]
    add x1, sp, #24
    add x2, sp, #16
    add x2, x2, x9, lsl #3
    svc #0
    neg w0, w0              // "refused ", the errno + 32, a newline
    add w0, w0, #0x20
    mov w1, #0x0a00
    add w0, w0, w1
    ldr x1, refused
    sub sp, sp, #16
    stp x1, x0, [sp]
    mov x8, #64             // write(status, it, 10)
    ldr w0, status
    mov x1, sp
    mov x2, #10
    svc #0
end:
    mov x8, #94             // exit_group(127)
    mov x0, #127
    svc #0
    .balign 8
refused:
    .ascii "refused "
status:
    .long 0x11111111
name:
    .asciz "sbx-start"
