"""Options that the HF Trainer, Accelerate's launcher and DeepSpeed's examples have, and what serves here instead.

docs/options.md holds the same list; a test compares them.
"""

FOREIGN_NAMES: dict[str, str] = {
    "epochs": "--num_train_epochs",
    "lr": "--learning_rate",
    "batch_size": "--per_device_train_batch_size, or --bags_per_step over all processes",
    "adam_beta1": "optimizer.params.betas of the DeepSpeed JSON",
    "adam_beta2": "optimizer.params.betas of the DeepSpeed JSON",
    "adam_epsilon": "optimizer.params.eps of the DeepSpeed JSON",
    "max_steps": "--num_train_epochs, whole passes over the slides",
    "gradient_checkpointing": "--partition checkpoint, or --partition auto within --gpu_budget",
    "logging_steps": "nothing: every epoch is logged, TensorBoard has every step",
    "report_to": "nothing: TensorBoard's logs are always written",
    "eval_strategy": "nothing: every epoch is validated",
    "evaluation_strategy": "nothing: every epoch is validated",
    "save_strategy": "--save_steps; ends of epochs are always saved",
    "load_best_model_at_end": "nothing: the best epoch by --metric_for_best_model is exported",
    "greater_is_better": "nothing: it follows from --metric_for_best_model, of which errors are better when lower",
    "mixed_precision": "--bf16 or --fp16",
    "per_device_eval_batch_size": "nothing: slides are evaluated one at a time, in chunks of tiles",
    "max_grad_clip": "--max_grad_norm",
    "zero_stage": "--deepspeed with a JSON, or accelerate launch --use_deepspeed --zero_stage",
    "model_name_or_path": "--encoder and --aggregator",
    "do_train": "nothing: `ds-wsi train` trains, and tests where there is a test split",
    "do_eval": "`ds-wsi evaluate`",
    "overwrite_output_dir": "another --output_dir, or --resume_from_checkpoint",
    "dataloader_pin_memory": "nothing: bags are page-locked where there is a GPU",
}
