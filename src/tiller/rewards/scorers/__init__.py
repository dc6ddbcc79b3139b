"""The scorers of the field: each a frozen dataclass of its settings whose instance is a reward.

Their models load at the first call, from safetensors, frozen and in evaluation mode; see `tiller.rewards.loading`.
"""
