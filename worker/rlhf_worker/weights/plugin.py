"""vLLM's plugin entry point (`vllm.general_plugins`): makes the planned backend known in every process that vLLM
starts.
"""

NAME = "planned"


def register() -> None:
    """Idempotent: vLLM loads its plugins more than once in a process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, "rlhf_worker.weights.receiver", "PlannedWeightTransferEngine")
    if NAME not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine(
            NAME, "rlhf_worker.weights.sender", "PlannedTrainerWeightTransferEngine",
        )
