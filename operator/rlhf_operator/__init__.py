"""The operator: an RLHFJob becomes a RayCluster, and what becomes of that is told in the job's status.

Law: `observed`, `decide` and `plan` are pure and get the time as an argument; `store` holds what there is and does no
I/O; only `cluster`, `refresh` and `leader` talk to the API server, through `client`; only `handlers` and `settings`
know kopf. Read `reconcile.py` first. """

FIELD_MANAGER = "rlhf-operator"
