"""`kubectl rlhf`. READ FIRST: `app.py` lists the verbs. Everything it does in a cluster goes through `rlhf_client`.

Nothing heavy is imported before a verb needs it: `kubectl rlhf list` must answer as fast as the API server does.
"""
