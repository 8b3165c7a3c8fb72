"""Rewards: scorer.py joins them, python.py runs functions in subprocesses, http.py asks services.

Law: this file and child.py import the standard library only; they run in every reward subprocess.
"""
