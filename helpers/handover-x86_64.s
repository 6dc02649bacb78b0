# What rootless/handover.py holds, and says why. To assemble it: as -o it.o handover-x86_64.s; objcopy -O binary -j .text it.o it
#
# long enter(frame, act), act 0 begin, 1 meet, 2 split, 3 lend, 4 hand back. No word of it touches the stack, which
# another process may be using. %rbx is the frame, %r12 the call that is being made, %r13 where to go when the list of
# calls is at its end.
    .globl enter
enter:
    cmp $1, %esi
    jb begin
    mov %rbx, (%rdi)        # what the caller expects to find again
    mov %rbp, 8(%rdi)
    mov %r12, 16(%rdi)
    mov %r13, 24(%rdi)
    mov %r14, 32(%rdi)
    mov %r15, 40(%rdi)
    mov %rsp, 48(%rdi)
    mov %rdi, %rbx
    je meet
    cmp $3, %esi
    jb work
    je lend
    movq $1, 192(%rbx)      # from here on whoever lent the memory may go on from where we are
    mov $14, %eax           # rt_sigprocmask(SIG_SETMASK, none): a signal that waits may end us now
    mov $2, %edi
    lea 320(%rbx), %rsi
    xor %edx, %edx
    mov $8, %r10d
    syscall
    mov 256(%rbx), %rax     # the last call, which does not return unless it fails
    mov 264(%rbx), %rdi
    mov 272(%rbx), %rsi
    mov 280(%rbx), %rdx
    mov 288(%rbx), %r10
    mov 296(%rbx), %r8
    syscall
    mov %rax, %r12
    mov $14, %eax           # rt_sigprocmask(SIG_SETMASK, all)
    mov $2, %edi
    lea 328(%rbx), %rsi
    xor %edx, %edx
    mov $8, %r10d
    syscall
    mov %r12, %rax
    movq $0, 192(%rbx)
    jmp restore
lend:
    mov $1, %eax            # write(go, "..", 2): one for the loan, one for the plan
    mov 112(%rbx), %rdi
    lea 128(%rbx), %rsi
    mov $2, %edx
    syscall
    mov $2, %esi            # what is waited for: that the status pipe is closed, or a signal
    xor %edx, %edx
watch:
    mov $271, %eax          # ppoll(both, 2, forever), then, after a signal, ppoll(pipe, 1, a second)
    lea 200(%rbx), %rdi
    xor %r10d, %r10d
    syscall
    test %rax, %rax
    js watch                # EINTR
    testb $0x10, 206(%rbx)  # POLLHUP: nobody is in our memory any more
    jnz left
    cmp $1, %esi
    je lost
    mov $1, %esi
    lea 216(%rbx), %rdx
    jmp watch
left:
    mov 192(%rbx), %rax     # 1 if it was handed back
    test %rax, %rax
    jnz restore
lost:
    mov $72, %eax           # fcntl(status, F_SETFD, 0)
    mov 120(%rbx), %rdi
    mov $2, %esi
    xor %edx, %edx
    syscall
    mov $59, %eax           # execve: all that is left of us is a half-done thought of another's
    mov 232(%rbx), %rdi
    mov 240(%rbx), %rsi
    mov 248(%rbx), %rdx
    syscall
    jmp end
meet:
    mov $1, %eax            # write(go, ".", 1)
    mov 112(%rbx), %rdi
    lea 128(%rbx), %rsi
    mov $1, %edx
    syscall
await:
    xor %eax, %eax          # read(status, byte, 1)
    mov 120(%rbx), %rdi
    lea 128(%rbx), %rsi
    mov $1, %edx
    syscall
    cmp $-4, %rax           # EINTR
    je await
    mov %rax, %rdx
    mov 56(%rbx), %rax      # the id of the new process, or what went wrong
    test %rdx, %rdx
    jg restore
    test %rax, %rax         # end of file: nobody is there to look after it
    js restore
    mov $-10, %rax          # ECHILD
    jmp restore
begin:
    mov %rdi, %r9
    mov 168(%r9), %rdi      # clone(flags, stack)
    mov 176(%r9), %rsi
    xor %edx, %edx
    xor %r10d, %r10d
    xor %r8d, %r8d
    mov $56, %eax
    syscall
    test %rax, %rax
    jz new
    ret
new:
    mov %r9, %rbx
work:
    mov 72(%rbx), %r12      # the calls before
    lea divide(%rip), %r13
    jmp next
divide:
    mov 88(%rbx), %rdi      # clone(flags, no stack: its own copy, or ours, which we leave alone; pidfd)
    xor %esi, %esi
    mov 104(%rbx), %rdx
    xor %r10d, %r10d
    xor %r8d, %r8d
    mov $56, %eax
    syscall
    test %rax, %rax
    jz onward
    jns stay
    cmpq $0, 168(%rbx)      # nobody was begun: the caller is still there to be told
    je restore
    xor %r12d, %r12d
    jmp fail
onward:
    mov 304(%rbx), %rdi     # the new process goes on where the caller was: at once, or when it is lent the memory
    test %rdi, %rdi
    jz restore
    mov $3, %eax            # close(holds), our copy of the other end
    syscall
    mov 312(%rbx), %rdi     # read(held, byte, 1): who cloned us has done what it had to do with us
    lea 128(%rbx), %rsi
    mov $1, %edx
    xor %eax, %eax
    syscall
    dec %rax
    jnz end                 # end of file, and nobody is there any more
    mov 184(%rbx), %rdi     # read(go, byte, 1): the memory is ours
    xor %eax, %eax
    syscall
    dec %rax
    jz restore
    jmp end
stay:
    mov %rax, 56(%rbx)
    mov 96(%rbx), %rdi      # its digits, from the last one on
    mov $10, %ecx
digit:
    xor %edx, %edx
    div %ecx
    add $48, %dl
    dec %rdi
    mov %dl, (%rdi)
    test %eax, %eax
    jnz digit
    mov 80(%rbx), %r12      # the calls after; the last one does not return
    lea end(%rip), %r13
next:
    mov (%r12), %rax        # the number, six arguments, where the result goes
    test %rax, %rax
    jns call
    jmp *%r13
call:
    mov 8(%r12), %rdi
    mov 16(%r12), %rsi
    mov 24(%r12), %rdx
    mov 32(%r12), %r10
    mov 40(%r12), %r8
    mov 48(%r12), %r9
    syscall
    cmp $-4095, %rax
    jae fail
    test %rax, %rax
    jnz told
    cmpq $0, (%r12)         # read: end of file means that whoever was to be waited for is gone
    je end
told:
    mov 56(%r12), %rcx
    test %rcx, %rcx
    jz done
    mov %rax, (%rcx)
done:
    add $64, %r12
    jmp next
fail:
    mov %r12, 64(%rbx)      # which, and why
    mov %rax, 56(%rbx)
    mov 160(%rbx), %rcx     # the errno + 32, as a byte in the text
    neg %eax
    add $32, %eax
    mov %al, (%rcx)
    mov $1, %eax            # write(status, text, length)
    mov 136(%rbx), %rdi
    mov 144(%rbx), %rsi
    mov 152(%rbx), %rdx
    syscall
end:
    mov $231, %eax          # exit_group(125)
    mov $125, %edi
    syscall
restore:
    mov 8(%rbx), %rbp
    mov 16(%rbx), %r12
    mov 24(%rbx), %r13
    mov 32(%rbx), %r14
    mov 40(%rbx), %r15
    mov 48(%rbx), %rsp
    mov (%rbx), %rbx
    ret
