"""The environment of processes that compute with torch on CPUs; read when they start.

Waiting threads spin unless they are set to sleep: on two busy cores with two threads, a VAE encodes 14 images/s with
spinning threads and 538 with sleeping ones. And glibc returns every tensor of more than 32 MB to the kernel, so that
the next one faults its pages in again: 12.6 images/s of 512 x 512 through a narrow VAE on two cores, two thirds of the
time in the kernel, against 34.8 if freed memory is kept. Only the main arena keeps it, so threads must share that one.
"""

TORCH_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
}
