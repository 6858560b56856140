"""A model whose code comes with its folder (--trust-remote-code), with faults to choose from."""

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput


class TinyConfig(PretrainedConfig):
    """between: a factor by which the model multiplies the hidden states between blocks.

    leaks: whether a block reads what it has computed for the batch before.
    """

    model_type = "tiny_remote"

    def __init__(
        self,
        vocab_size: int = 101,
        hidden_size: int = 48,
        num_hidden_layers: int = 2,
        between: float = 1.0,
        leaks: bool = False,
        **more: object,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.between = between
        self.leaks = leaks
        super().__init__(**more)


class TinyBlock(nn.Module):
    """Mixes each token with the mean of those before it."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.leaks = config.leaks
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)
        self.own = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.last: Tensor | float = 0.0

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden)
        counts = torch.arange(1, x.shape[1] + 1, device=x.device).view(1, -1, 1)
        mean = self.mix(x).cumsum(1) / counts + self.last
        if self.leaks:
            self.last = mean[0, -1].detach()
        return hidden + self.out(torch.nn.functional.silu(self.own(x)) * mean)


class TinyPreTrainedModel(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "model"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(std=module.weight.shape[-1] ** -0.5)


class TinyModel(TinyPreTrainedModel):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(TinyBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, **unused: object) -> BaseModelOutput:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden) * self.config.between
        return BaseModelOutput(last_hidden_state=self.norm(hidden))


class TinyForCausalLM(TinyPreTrainedModel, GenerationMixin):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.model = TinyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **unused: object) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))

    def prepare_inputs_for_generation(self, input_ids: Tensor, **unused: object) -> dict:
        return {"input_ids": input_ids}
