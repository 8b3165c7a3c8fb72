"""A single-node Kubernetes for developing and testing RLHFJobs: ``python -m hack.cluster up | down | status``.

Standard library only, so that it starts under a bare Python 3.11. The tour:

``settings``   what is fixed (versions, address ranges) and what the clone decides (paths, names) ``binaries``   every
program, built or unpacked once into a cache outside the clone ``components`` the command line and the configuration of
each part, as pure functions ``runtime``    what a container sees of this machine, and the images ``supervisor`` the
first process of the cluster's namespaces: starts the parts and restarts them ``logical_gpus``, ``claims``, ``policies``
small controllers: GPUs of the node, volumes for claims, enforced NetworkPolicies ``embedded``   up, down and status of
the whole ``kuberay_standin`` the controller that keeps KubeRay's contract where the real one cannot be had """
