# What rootless/init.py holds, and says why. To assemble it: as -o it.o supervisor-x86_64.s; objcopy -O binary -j .text it.o it
    .globl _start
_start:
    mov $157, %eax          # prctl(PR_SET_NAME, name)
    mov $15, %edi
    lea name(%rip), %rsi
    syscall
    mov process(%rip), %ebx # the id of pid 1, filled in
    sub $32, %rsp           # two struct pollfd, then the status
    mov go(%rip), %eax      # .events = 0: a hang-up is always reported
    mov %rax, (%rsp)
    mov pidfd(%rip), %eax
    mov %rax, 8(%rsp)
    movw $1, 12(%rsp)       # .events = POLLIN
again:
    mov $7, %eax            # poll(fds, 2, -1)
    mov %rsp, %rdi
    mov $2, %esi
    mov $-1, %rdx
    syscall
    test %eax, %eax
    jle again
    movzwl 6(%rsp), %r12d   # go's revents: the parent is gone
    test %r12d, %r12d
    jz wait
    mov $62, %eax           # kill(process, SIGKILL)
    mov %ebx, %edi
    mov $9, %esi
    syscall
wait:
    mov $61, %eax           # wait4(process, &status, 0, NULL)
    mov %rbx, %rdi
    lea 16(%rsp), %rsi
    xor %edx, %edx
    xor %r10d, %r10d
    syscall
    test %r12d, %r12d
    jz report
    mov $59, %eax           # execve(argv[1], argv + 1, NULL): clean up in the parent's place
    mov 48(%rsp), %rdi
    lea 48(%rsp), %rsi
    xor %edx, %edx
    syscall
report:
    movzbl 17(%rsp), %edi   # its exit status
    mov 16(%rsp), %eax
    and $0x7f, %eax         # or the signal that ended it
    jz end
    lea 128(%rax), %edi
end:
    mov $231, %eax          # exit_group
    syscall
process:
    .long 0x11111111
go:
    .long 0x11111111
pidfd:
    .long 0x11111111
name:
    .asciz "sbx-supervisor"
