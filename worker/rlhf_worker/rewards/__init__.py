"""Rewards: scorer.py joins them, pool.py runs functions in subprocesses, http.py and judge.py ask services.

Law: this file and child.py import the standard library only; they run in every reward subprocess.
"""
