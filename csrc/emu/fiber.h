// A fiber: a function on a stack of its own that hands control back and forth with its owner.
//
// On x86-64 the switch is six pushes (ucontext makes two system calls per switch, and a block switches thousands of
// times). AddressSanitizer is told about every change of stack, so it works on fibers too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "fail.h"

namespace emu {

class Fiber;

#if defined(__x86_64__)
struct Context {
    void* stack_pointer = nullptr;
};

// Saves the callee-saved registers and the stack pointer in `from`, continues where `to` was saved.
extern "C" void emu_switch(Context* from, const Context* to);
asm(R"(
    .text
    .weak emu_switch
    .type emu_switch, @function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emu_switch, .-emu_switch
)");

// A stack on which the first switch "returns" into `entry`, aligned as after a call.
inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
    const uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(15);
    void** at = reinterpret_cast<void**>(top);
    *--at = nullptr;
    *--at = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--at = nullptr;
    context.stack_pointer = at;
}
#else
struct Context {
    ucontext_t saved;
};

inline void emu_switch(Context* from, const Context* to) { swapcontext(&from->saved, &to->saved); }

inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context.saved);
    context.saved.uc_stack.ss_sp = stack;
    context.saved.uc_stack.ss_size = bytes;
    context.saved.uc_link = nullptr;
    makecontext(&context.saved, entry, 0);
}
#endif

class Fiber {
public:
    static constexpr size_t kStackBytes = 128 << 10;   // sanitizers make frames large

    using Body = void (*)(void*);

    // The next resume() starts body(argument).
    void start(Body body, void* argument) {
        if (!stack_) stack_.reset(new char[kStackBytes]);
        body_ = body;
        argument_ = argument;
        finished_ = false;
        prepare(own_, stack_.get(), kStackBytes, &Fiber::enter);
    }

    // Runs the fiber until it yields or ends. Called by the owner.
    void resume() {
        current_ = this;
        switch_stack(&owner_, &own_, &owner_fake_stack_, stack_.get(), kStackBytes);
        arrived(owner_fake_stack_, nullptr, nullptr);
        current_ = nullptr;
    }

    // Back to the owner. Called on the fiber.
    static void yield() {
        Fiber& self = *current_;
        switch_stack(&self.own_, &self.owner_, &self.fake_stack_, self.owner_stack_, self.owner_stack_bytes_);
        arrived(self.fake_stack_, &self.owner_stack_, &self.owner_stack_bytes_);
    }

    bool finished() const { return finished_; }

private:
    static void enter() {
        Fiber& self = *current_;
        arrived(nullptr, &self.owner_stack_, &self.owner_stack_bytes_);
        self.body_(self.argument_);
        self.finished_ = true;
        // A null fake stack tells the sanitizer that this stack is done with.
        switch_stack(&self.own_, &self.owner_, nullptr, self.owner_stack_, self.owner_stack_bytes_);
        fail("a finished fiber was resumed");
    }

#if defined(__SANITIZE_ADDRESS__)
    static void switch_stack(Context* from, const Context* to, void** fake, const void* stack, size_t bytes) {
        __sanitizer_start_switch_fiber(fake, stack, bytes);
        emu_switch(from, to);
    }
    static void arrived(void* fake, const void** old_stack, size_t* old_bytes) {
        __sanitizer_finish_switch_fiber(fake, old_stack, old_bytes);
    }
#else
    static void switch_stack(Context* from, const Context* to, void**, const void*, size_t) { emu_switch(from, to); }
    static void arrived(void*, const void**, size_t*) {}
#endif

    static inline Fiber* current_ = nullptr;
    std::unique_ptr<char[]> stack_;
    Context own_, owner_;
    Body body_ = nullptr;
    void* argument_ = nullptr;
    bool finished_ = true;
    void* fake_stack_ = nullptr;
    void* owner_fake_stack_ = nullptr;
    const void* owner_stack_ = nullptr;
    size_t owner_stack_bytes_ = 0;
};

}   // namespace emu
