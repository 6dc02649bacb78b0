# What rootless/init.py holds, and says why. To assemble it: as -o it.o init-x86_64.s; objcopy -O binary -j .text it.o it
    .globl _start
_start:
    mov $157, %eax          # prctl(PR_SET_NAME, name)
    mov $15, %edi
    lea name(%rip), %rsi
    syscall
    mov command(%rip), %ebx # the command's id, filled in
    sub $16, %rsp
next:
    mov $128, %eax          # rt_sigtimedwait(all, NULL, NULL, 8)
    lea all(%rip), %rdi
    xor %esi, %esi
    xor %edx, %edx
    mov $8, %r10d
    syscall
    cmp $17, %eax           # SIGCHLD
    je reap
    mov %eax, %esi          # kill(command, signal)
    mov $62, %eax
    mov %ebx, %edi
    syscall
    jmp next
reap:
    mov $61, %eax           # wait4(-1, &status, WNOHANG, NULL)
    mov $-1, %rdi
    mov %rsp, %rsi
    mov $1, %edx
    xor %r10d, %r10d
    syscall
    test %eax, %eax
    jle next
    cmp %ebx, %eax
    jne reap
    movzbl 1(%rsp), %edi    # its exit status
    mov (%rsp), %eax
    and $0x7f, %eax         # or the signal that ended it
    jz end
    lea 128(%rax), %edi
end:
    mov $231, %eax          # exit_group
    syscall
    .balign 8
all:
    .quad -1
command:
    .long 0x11111111
name:
    .asciz "sbx-init"
