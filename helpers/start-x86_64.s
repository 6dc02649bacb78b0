# What rootless/init.py holds, and says why. To assemble it: as -o it.o start-x86_64.s; objcopy -O binary -j .text it.o it
    .globl _start
_start:
    mov $157, %eax          # prctl(PR_SET_DUMPABLE, 0)
    mov $4, %edi
    xor %esi, %esi
    syscall
    mov $72, %eax           # fcntl(status, F_SETFD, FD_CLOEXEC)
    mov status(%rip), %edi
    mov $2, %esi
    mov $1, %edx
    syscall
    test %eax, %eax         # no status: a file of the sandbox had us executed once more
    jnz end
    mov (%rsp), %rax        # argc, argv, NULL, envp
    mov 16(%rsp), %rdi      # execve(argv[1], argv + 2, envp)
    lea 24(%rsp), %rsi
    lea 16(%rsp,%rax,8), %rdx
    mov $59, %eax
    syscall
    neg %eax                # "refused ", the errno + 32, a newline
    add $0x0a20, %eax
    push %rax
    mov refused(%rip), %rax
    push %rax
    mov $1, %eax            # write(status, it, 10)
    mov status(%rip), %edi
    mov %rsp, %rsi
    mov $10, %edx
    syscall
end:
    mov $231, %eax          # exit_group(127)
    mov $127, %edi
    syscall
    .balign 8
refused:
    .ascii "refused "
status:
    .long 0x11111111
name:
    .asciz "sbx-start"
