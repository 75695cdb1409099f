"""Do my tasks need a mixture? What one LoRA for all tasks loses against a LoRA for each, and why."""
