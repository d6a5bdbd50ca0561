"""The teacher server: scores a student's tokens while they are being generated."""

from teacher_wire import __version__ as __version__
