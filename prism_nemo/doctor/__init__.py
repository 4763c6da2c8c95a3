"""`prism-nemo doctor`: whether nodes can train, before a job spends hours on finding out.

A rank is two kinds of process. The one that was started never touches a GPU, a collective or a file system that may hang: it$
to the other ranks over plain sockets (`meeting.py`) and starts children for everything that can hang (`probe.py`), which it kills
when their time is up. So there is always somebody left to say what did not answer.
"""
