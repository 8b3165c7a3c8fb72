"""The operator: an RLHFJob becomes a RayCluster, and what becomes of that is told in the job's status.

Law: `observed`, `decide` and `plan` are pure and get the time as an argument; only `cluster` and `client` talk to the API
server; only `handlers` and `__main__` know kopf. Read `reconcile.py` first.
"""

FIELD_MANAGER = "rlhf-operator"
