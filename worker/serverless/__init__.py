"""Runpod's job queue: jobs are taken, run and answered. Only here is runpod imported."""
