"""An x86-64 processor and PC interrupt hardware in Python: the backend that needs no /dev/kvm."""
