"""An arm64 userland without a board: an emulator, a Debian root and real wheels, in a cache.

Nothing here needs root, apt, binfmt or a mount: packages are taken from the distribution's mirror
by HTTP, checked against its signed index, and unpacked. docs/arm64.md tells what it proves.
"""
