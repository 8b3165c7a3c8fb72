"""What only a driver in a pod has: its job at the API server, reports, a number, ears for pods that go, a kept log."""
