"""Devices: the parts of a PC that programs talk to, and a base to build others on.

Each is composed by its constructor from what it needs (an interrupt line, an output) and knows neither its
address nor the machine. Attach them with `VM.attach`.
"""
