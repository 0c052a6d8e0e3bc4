"""The environment of processes that compute with torch on CPUs; read when they start.

Threads that wait spin, unless told to sleep: on two busy cores with two threads, 14 images/s through a VAE spinning,
538 sleeping. And glibc gives every tensor of more than 32 MB back to the kernel and lets the next one fault its pages
in again: 12.6 images/s of 512 x 512 through a narrow VAE on two cores, two thirds of the time in the kernel, against
34.8 if freed memory is kept. Kept it is only in the main arena, so threads must share that one.
"""

TORCH_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
}
