"""Lends this machine to a llama.cpp on another one."""
