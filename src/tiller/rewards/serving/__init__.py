"""Rewards behind HTTP: a server for any reward, a client for a remote one, one in a virtual environment of its own.

`protocol`, `answers`, `timed`, `server` and `child` need the Python standard library and Pillow alone, so that they run
inside the environment of a reward whose packages do not get on with ours. They import each other relatively, for
there they are no part of `tiller`.
"""
