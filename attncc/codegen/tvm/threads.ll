; TVM's parallel loops on the OpenMP pool that torch has: one pool, torch.set_num_threads obeyed, no thread that spins
; beside it. The library's user hands over three of that pool's functions before the first call.

%Group = type { ptr, i32 }                    ; what a loop body is told: a handle (unused), and how many tasks there are
%Loop = type { ptr, ptr, i32, i32, i32 }      ; body, its data, next task, tasks, first error
%Any = type { i32, i32, i64 }                 ; an argument of a TVM function: type, padding, value

@in_parallel = internal global ptr null       ; int omp_in_parallel(void)
@max_threads = internal global ptr null       ; int omp_get_max_threads(void)
@parallel = internal global ptr null          ; void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned)

declare i32 @posix_memalign(ptr, i64, i64)
declare void @free(ptr)

; every thread takes tasks until there are none
define internal void @take_tasks(ptr %loop) {
entry:
  %group = alloca %Group, align 8
  %body = load ptr, ptr %loop, align 8
  %data.at = getelementptr %Loop, ptr %loop, i32 0, i32 1
  %data = load ptr, ptr %data.at, align 8
  %next.at = getelementptr %Loop, ptr %loop, i32 0, i32 2
  %tasks.at = getelementptr %Loop, ptr %loop, i32 0, i32 3
  %tasks = load i32, ptr %tasks.at, align 4
  %error.at = getelementptr %Loop, ptr %loop, i32 0, i32 4
  store ptr null, ptr %group, align 8
  %count.at = getelementptr %Group, ptr %group, i32 0, i32 1
  store i32 %tasks, ptr %count.at, align 8
  br label %again
again:
  %task = atomicrmw add ptr %next.at, i32 1 monotonic
  %done = icmp sge i32 %task, %tasks
  br i1 %done, label %exit, label %run
run:
  %code = call i32 %body(i32 %task, ptr %group, ptr %data)
  %failed = icmp ne i32 %code, 0
  br i1 %failed, label %error, label %again
error:
  store atomic i32 %code, ptr %error.at monotonic, align 4
  br label %again
exit:
  ret void
}

; four tasks a thread, so that uneven ones even out; one thread inside another parallel region
define internal i32 @launch(ptr %body, ptr %data, i32 %unused) {
entry:
  %group = alloca %Group, align 8
  %loop = alloca %Loop, align 8
  %in.f = load ptr, ptr @in_parallel, align 8
  %nested.i = call i32 %in.f()
  %max.f = load ptr, ptr @max_threads, align 8
  %threads = call i32 %max.f()
  %alone = icmp sle i32 %threads, 1
  %nested = icmp ne i32 %nested.i, 0
  %serial = or i1 %alone, %nested
  br i1 %serial, label %here, label %shared
here:
  store ptr null, ptr %group, align 8
  %count.at = getelementptr %Group, ptr %group, i32 0, i32 1
  store i32 1, ptr %count.at, align 8
  %code = call i32 %body(i32 0, ptr %group, ptr %data)
  ret i32 %code
shared:
  %tasks = mul i32 %threads, 4
  store ptr %body, ptr %loop, align 8
  %data.at = getelementptr %Loop, ptr %loop, i32 0, i32 1
  store ptr %data, ptr %data.at, align 8
  %next.at = getelementptr %Loop, ptr %loop, i32 0, i32 2
  store i32 0, ptr %next.at, align 4
  %tasks.at = getelementptr %Loop, ptr %loop, i32 0, i32 3
  store i32 %tasks, ptr %tasks.at, align 4
  %error.at = getelementptr %Loop, ptr %loop, i32 0, i32 4
  store i32 0, ptr %error.at, align 4
  %fork = load ptr, ptr @parallel, align 8
  call void %fork(ptr @take_tasks, ptr %loop, i32 %threads, i32 0)
  %first = load i32, ptr %error.at, align 4
  ret i32 %first
}

define internal ptr @allocate(i32 %device, i32 %number, i64 %bytes, i32 %code, i32 %bits) {
entry:
  %at = alloca ptr, align 8
  store ptr null, ptr %at, align 8
  %failed = call i32 @posix_memalign(ptr %at, i64 64, i64 %bytes)
  %found = load ptr, ptr %at, align 8
  ret ptr %found
}

define internal i32 @release(i32 %device, i32 %number, ptr %memory) {
entry:
  call void @free(ptr %memory)
  ret i32 0
}

; threads(in_parallel, max_threads, parallel, which) -> the address of launch (0), allocate (1) or release (2)
define dllexport i32 @__tvm_ffi_threads(ptr %self, ptr %args, i32 %count, ptr %result) {
entry:
  %a0 = getelementptr %Any, ptr %args, i32 0, i32 2
  %v0 = load ptr, ptr %a0, align 8
  store ptr %v0, ptr @in_parallel, align 8
  %a1 = getelementptr %Any, ptr %args, i32 1, i32 2
  %v1 = load ptr, ptr %a1, align 8
  store ptr %v1, ptr @max_threads, align 8
  %a2 = getelementptr %Any, ptr %args, i32 2, i32 2
  %v2 = load ptr, ptr %a2, align 8
  store ptr %v2, ptr @parallel, align 8
  %a3 = getelementptr %Any, ptr %args, i32 3, i32 2
  %which = load i64, ptr %a3, align 8
  %is1 = icmp eq i64 %which, 1
  %is2 = icmp eq i64 %which, 2
  %some = select i1 %is1, ptr @allocate, ptr @launch
  %one = select i1 %is2, ptr @release, ptr %some
  %address = ptrtoint ptr %one to i64
  store i32 1, ptr %result, align 8
  %pad.at = getelementptr %Any, ptr %result, i32 0, i32 1
  store i32 0, ptr %pad.at, align 4
  %value.at = getelementptr %Any, ptr %result, i32 0, i32 2
  store i64 %address, ptr %value.at, align 8
  ret i32 0
}
