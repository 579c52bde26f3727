"""A Runpod serverless endpoint on this machine: the job queue and its HTTP faces.

`jobs` and `dispatch` hold the queue and know no HTTP; `client_api`, `openai_api` and `worker_api`
are its HTTP faces; `workers` starts and watches the worker processes; `__main__` is the command
line.
"""
