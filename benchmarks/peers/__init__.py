"""Other servers that the serving benchmark measures, each in an environment of its own.

``make peers`` installs them; ``benchmarks/contenders/`` starts and calls them.
"""
