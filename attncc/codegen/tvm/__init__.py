"""The CPU back-end: attention kernels built by TVM, which deploy as one small library each."""
