"""A stand-in for the KubeRay operator, for clusters where the real one cannot be had.

It keeps KubeRay 1.7's contract for RayClusters as far as RLHFJob uses it: labels, names, environment, services,
``ray start`` commands, probes, the token Secret, events, suspension, recreation of pods, and the status with its
traps (``ready`` and ``RayClusterProvisioned`` never revert, an invalid spec is only an Event, ``observedGeneration``
may stay old). Two things differ, on purpose: the head service has a cluster IP, and workers find the head by it, so
no DNS is needed; and what it does not implement (autoscaling, GCS fault tolerance, TLS, ingress) it refuses by Event.

``pods``, ``objects``, ``status`` and ``checks`` are pure; ``controller`` does the I/O.
"""
