"""What an option of another framework is in an RLHFJob: data alone. A name that is in no table is told as not carried
over. By the documentation of TRL's GRPOConfig, verl's ppo_trainer.yaml and OpenRLHF's train_ppo_ray.
"""

from dataclasses import dataclass
from typing import Any

Values = dict[Any, Any]


@dataclass(frozen=True, slots=True)
class To:
    """`path`: of the spec. `values`: what each value becomes; one that is not there is not carried over."""

    path: str
    values: Values | None = None


NORMALIZATION: Values = {True: "group", "group": "group", "batch": "batch", False: "none", "none": "none"}
SCHEDULES: Values = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}
DTYPES: Values = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "fp32": "float32"}
ESTIMATORS: Values = {"k1": "k1", "k2": "k2", "k3": "k3", "kl": "k1", "mse": "k2", "low_var_kl": "k3"}
ADVANTAGES: Values = {
    "gae": "ppo", "grpo": "grpo", "group_norm": "grpo", "rloo": "rloo", "dr_grpo": "dr_grpo",
    "reinforce_plus_plus": "reinforce++", "reinforce_plus_plus_baseline": "reinforce++-baseline",
    "reinforce": "reinforce++", "reinforce_baseline": "reinforce++-baseline",
}  # fmt: skip
TRL_LOSSES: Values = {"grpo": "sequences", "dapo": "tokens", "bnpo": "tokens"}
AGGREGATIONS: Values = {"token-mean": "tokens", "seq-mean-token-mean": "sequences"}

TRL: dict[str, To] = {
    "model_name_or_path": To("model.path"), "trust_remote_code": To("model.trustRemoteCode"),
    "dtype": To("model.dtype", DTYPES), "torch_dtype": To("model.dtype", DTYPES),
    "dataset_name": To("data.dataset.path"), "dataset_config": To("data.dataset.name"),
    "dataset_train_split": To("data.dataset.split"), "max_prompt_length": To("data.maxPromptTokens"),
    "max_completion_length": To("rollout.maxTokens"), "num_generations": To("rollout.samplesPerPrompt"),
    "temperature": To("rollout.temperature"), "repetition_penalty": To("rollout.sampling.repetitionPenalty"),
    "beta": To("algorithm.kl.coefficient"), "epsilon_high": To("algorithm.clipHigh"), "delta": To("algorithm.dualClip"),
    "scale_rewards": To("algorithm.advantageNormalization", NORMALIZATION), "num_iterations": To("trainer.epochs"),
    "learning_rate": To("trainer.learningRate"), "lr_scheduler_type": To("trainer.learningRateSchedule", SCHEDULES),
    "warmup_steps": To("trainer.warmupSteps"), "weight_decay": To("trainer.weightDecay"),
    "adam_beta1": To("trainer.adamBeta1"), "adam_beta2": To("trainer.adamBeta2"),
    "adam_epsilon": To("trainer.adamEpsilon"), "max_grad_norm": To("trainer.maxGradNorm"),
    "gradient_checkpointing": To("trainer.gradientCheckpointing"), "max_steps": To("trainer.steps"),
    "seed": To("trainer.seed"), "save_steps": To("checkpoint.everySteps"), "save_total_limit": To("checkpoint.keep"),
    "lora_r": To("model.lora.rank"), "lora_alpha": To("model.lora.alpha"),
    "lora_target_modules": To("model.lora.targetModules"),
    "vllm_mode": To("placement.mode", {"colocate": "Colocated", "server": "Separated"}),
    "vllm_tensor_parallel_size": To("rollout.tensorParallelSize"),
    "vllm_gpu_memory_utilization": To("rollout.engineArgs.gpu_memory_utilization"),
    "vllm_max_model_length": To("rollout.engineArgs.max_model_len"),
    "vllm_enable_sleep_mode": To("rollout.sleep"),
    "vllm_importance_sampling_cap": To("algorithm.correction.tokenCap"),
}  # fmt: skip
TRL_SPECIAL = (
    "epsilon", "loss_type", "importance_sampling_level", "per_device_train_batch_size", "use_peft", "use_vllm",
    "gradient_accumulation_steps", "steps_per_generation", "bf16", "top_k", "top_p", "reward_weights",
    "vllm_importance_sampling_correction",
)  # fmt: skip

VERL: dict[str, To] = {
    "actor_rollout_ref.model.path": To("model.path"),
    "actor_rollout_ref.model.trust_remote_code": To("model.trustRemoteCode"),
    "actor_rollout_ref.model.enable_gradient_checkpointing": To("trainer.gradientCheckpointing"),
    "actor_rollout_ref.model.lora_alpha": To("model.lora.alpha"),
    "data.prompt_key": To("data.promptField"), "data.max_prompt_length": To("data.maxPromptTokens"),
    "data.max_response_length": To("rollout.maxTokens"), "data.train_batch_size": To("rollout.promptsPerStep"),
    "data.filter_overlong_prompts": To("data.overlongPrompts", {True: "drop", False: "refuse"}),
    "data.seed": To("data.seed"),
    "actor_rollout_ref.actor.optim.lr": To("trainer.learningRate"),
    "actor_rollout_ref.actor.optim.lr_warmup_steps": To("trainer.warmupSteps"),
    "actor_rollout_ref.actor.optim.weight_decay": To("trainer.weightDecay"),
    "actor_rollout_ref.actor.ppo_epochs": To("trainer.epochs"),
    "actor_rollout_ref.actor.grad_clip": To("trainer.maxGradNorm"),
    "actor_rollout_ref.actor.clip_ratio_low": To("algorithm.clipLow"),
    "actor_rollout_ref.actor.clip_ratio_high": To("algorithm.clipHigh"),
    "actor_rollout_ref.actor.clip_ratio_c": To("algorithm.dualClip"),
    "actor_rollout_ref.actor.entropy_coeff": To("algorithm.entropyCoefficient"),
    "actor_rollout_ref.actor.loss_agg_mode": To("algorithm.lossAggregation", AGGREGATIONS),
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": To("trainer.tokensPerMicroBatch"),
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": To("trainer.contextParallel"),
    "actor_rollout_ref.actor.use_torch_compile": To("trainer.compile"),
    "actor_rollout_ref.actor.fsdp_config.param_offload": To("trainer.offload"),
    "actor_rollout_ref.rollout.n": To("rollout.samplesPerPrompt"),
    "actor_rollout_ref.rollout.temperature": To("rollout.temperature"),
    "actor_rollout_ref.rollout.tensor_model_parallel_size": To("rollout.tensorParallelSize"),
    "actor_rollout_ref.rollout.gpu_memory_utilization": To("rollout.engineArgs.gpu_memory_utilization"),
    "actor_rollout_ref.rollout.max_model_len": To("rollout.engineArgs.max_model_len"),
    "actor_rollout_ref.rollout.max_num_seqs": To("rollout.engineArgs.max_num_seqs"),
    "actor_rollout_ref.rollout.enforce_eager": To("rollout.engineArgs.enforce_eager"),
    "algorithm.adv_estimator": To("algorithm.name", ADVANTAGES),
    "algorithm.gamma": To("algorithm.gae.gamma"), "algorithm.lam": To("algorithm.gae.lambda"),
    "algorithm.norm_adv_by_std_in_grpo": To("algorithm.advantageNormalization", {True: "group", False: "none"}),
    "critic.optim.lr": To("critic.learningRate"), "critic.model.path": To("critic.model.path"),
    "critic.cliprange_value": To("algorithm.valueClip"), "trainer.critic_warmup": To("critic.warmupSteps"),
    "trainer.total_training_steps": To("trainer.steps"), "trainer.save_freq": To("checkpoint.everySteps"),
    "trainer.n_gpus_per_node": To("placement.gpusPerNode"),
}  # fmt: skip
VERL_SPECIAL = (
    "data.train_files", "data.val_files", "trainer.test_freq", "trainer.nnodes", "reward_model.enable",
    "reward_model.model.path", "actor_rollout_ref.actor.use_kl_loss", "actor_rollout_ref.actor.kl_loss_coef",
    "actor_rollout_ref.actor.kl_loss_type", "algorithm.use_kl_in_reward", "algorithm.kl_ctrl.kl_coef",
    "algorithm.kl_penalty", "actor_rollout_ref.actor.ppo_mini_batch_size", "actor_rollout_ref.actor.clip_ratio",
    "actor_rollout_ref.rollout.top_k", "actor_rollout_ref.rollout.top_p", "actor_rollout_ref.rollout.name",
    "actor_rollout_ref.model.lora_rank", "actor_rollout_ref.model.use_remove_padding",
)  # fmt: skip

OPENRLHF: dict[str, To] = {
    "pretrain": To("model.path"), "input_key": To("data.promptField"), "prompt_split": To("data.dataset.split"),
    "apply_chat_template": To("data.chatTemplate"), "prompt_max_len": To("data.maxPromptTokens"),
    "generate_max_len": To("rollout.maxTokens"), "n_samples_per_prompt": To("rollout.samplesPerPrompt"),
    "rollout_batch_size": To("rollout.promptsPerStep"), "temperature": To("rollout.temperature"),
    "max_epochs": To("trainer.epochs"), "actor_learning_rate": To("trainer.learningRate"),
    "critic_learning_rate": To("critic.learningRate"), "init_kl_coef": To("algorithm.kl.coefficient"),
    "kl_target": To("algorithm.kl.target"), "kl_horizon": To("algorithm.kl.horizon"),
    "kl_estimator": To("algorithm.kl.estimator", ESTIMATORS), "value_clip": To("algorithm.valueClip"),
    "gamma": To("algorithm.gae.gamma"), "lambd": To("algorithm.gae.lambda"), "l2": To("trainer.weightDecay"),
    "advantage_estimator": To("algorithm.name", ADVANTAGES), "max_norm": To("trainer.maxGradNorm"),
    "entropy_loss_coef": To("algorithm.entropyCoefficient"), "dual_clip": To("algorithm.dualClip"),
    "vllm_num_engines": To("rollout.engines"), "vllm_tensor_parallel_size": To("rollout.tensorParallelSize"),
    "vllm_gpu_memory_utilization": To("rollout.engineArgs.gpu_memory_utilization"),
    "vllm_enable_sleep": To("rollout.sleep"),
    "enforce_eager": To("rollout.engineArgs.enforce_eager"),
    "gradient_checkpointing": To("trainer.gradientCheckpointing"),
    "adam_offload": To("trainer.offload"), "lora_alpha": To("model.lora.alpha"),
    "target_modules": To("model.lora.targetModules"), "save_steps": To("checkpoint.everySteps"),
    "seed": To("trainer.seed"), "max_ckpt_num": To("checkpoint.keep"), "ring_attn_size": To("trainer.contextParallel"),
    "critic_pretrain": To("critic.model.path"), "freezing_actor_steps": To("critic.warmupSteps"),
    "actor_num_gpus_per_node": To("placement.gpusPerNode"), "param_dtype": To("model.dtype", DTYPES),
    "train_max_tokens_per_gpu": To("trainer.tokensPerMicroBatch"),
}  # fmt: skip
OPENRLHF_SPECIAL = (
    "prompt_data", "eps_clip", "eps_clip_low_high", "use_kl_loss", "train_batch_size", "actor_num_nodes",
    "colocate_all_models", "reward_pretrain", "lora_rank", "top_p", "bf16", "packing_samples",
    "enable_vllm_is_correction",
)  # fmt: skip
