"""The conformance suite under other kernels: stock kernels of Debian releases, booted in a virtual machine."""
