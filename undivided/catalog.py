"""The attention systems of the library, one row each.

The command line, the README's table and the contract tests read this file. It imports nothing but the
standard library, so that asking what exists costs nothing.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

KINDS: dict[str, str] = {
    "latent": "keys and values, or the whole attention, in a compressed latent space",
    "heads": "how heads are shared, grouped, paired or chosen",
    "local": "fixed windows along one to three axes",
    "sparse": "keys or blocks chosen by content",
    "linear": "cost linear in the number of tokens",
    "mixer": "token mixers, gates and pooling beside plain dot-product attention",
    "vision": "layers and backbones for images, several views and pose",
    "multimodal": "vision-language and vision-language-action models",
    "decoding": "generation changed without training",
    "inspection": "what a trained model represents",
    "training": "how a model learns, or learns a new attention",
    "distributed": "attention spread over many devices",
    "theory": "specifications, analyses and benchmarks of attention",
    "application": "programs for people that are not a model",
}
STATES: dict[str, str] = {
    "planned": "not written yet; `code` names where it will live",
    "partial": "some of it can be used",
    "works": "usable, tested, and measured against its paper",
}
FIDELITIES: dict[str, str] = {
    "official": "checked against the authors' code",
    "paper": "written from the paper's text",
    "reconstruction": "the text is not enough; the module says what was decided",
}


@dataclass(frozen=True)
class System:
    """One published attention system and where it lives in the library.

    Args:
        number: 1 to 54, the order of the table.
        slug: The system's name in modules, tests, results and commands.
        name: The name its field uses.
        title: Title of the paper.
        year: Year of its first public version.
        arxiv: arXiv number.
        kind: A key of `KINDS`.
        summary: One sentence: what it changes and for whom.
        code: Dotted modules where it lives, or will live.
        state: A key of `STATES`.
        fidelity: A key of `FIDELITIES`; None while planned.
    """

    number: int
    slug: str
    name: str
    title: str
    year: int
    arxiv: str
    kind: str
    summary: str
    code: tuple[str, ...]
    state: str = "planned"
    fidelity: str | None = None

    @property
    def link(self) -> str:
        """Address of the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}"


def get(slug: str) -> System:
    """Returns the row of one system.

    Args:
        slug: The system's name, such as `"tpla"`.

    Raises:
        ValueError: If no system has that slug; the message lists the nearest ones.
    """
    if slug in _BY_SLUG:
        return _BY_SLUG[slug]
    raise ValueError(f'no system is called "{slug}"; {_suggestion(slug)}')


def _suggestion(slug: str) -> str:
    # People type names as papers print them ("X-EcoMLA", "GCoNet+"), so names are compared as well as slugs.
    spellings = {name.lower(): row.slug for row in SYSTEMS for name in (row.slug, *row.name.split(" / "))}
    matches = difflib.get_close_matches(slug.lower().replace("-", "_"), spellings, n=6, cutoff=0.6)
    near = list(dict.fromkeys(spellings[match] for match in matches))[:3]
    if near:
        return f"near matches: {', '.join(near)}."
    return "`undivided systems` lists all."


# Formatting is off because the formatter would give every field a line of its own: 600 lines in place of 370.
# fmt: off
SYSTEMS: tuple[System, ...] = (
    System(
        1, "tpla", "TPLA",
        "TPLA: Tensor Parallel Latent Attention for Efficient Disaggregated Prefill & Decode Inference",
        2025, "2508.15881", "latent",
        "Splits the MLA latent over ranks without retraining, for tensor-parallel serving.",
        ("undivided.layers.tpla", "undivided.convert.tpla"), "works", "paper",
    ),
    System(
        2, "gda", "GDA", "Grouped Differential Attention", 2025, "2510.06949", "heads",
        "Subtracts a few noise heads from many signal heads; differential attention made cheaper.",
        (
            "undivided.layers.gda", "undivided.layers.gda_v2", "undivided.layers.gdla",
            "undivided.ops.differential", "undivided.convert.gda_grow",
        ),
        "works", "paper",
    ),
    System(
        3, "dha", "DHA",
        "DHA: Learning Decoupled-Head Attention from Transformer Checkpoints via Adaptive Heads Fusion",
        2024, "2406.06567", "heads",
        "Fuses similar key heads and value heads, per layer, to shrink a trained model's cache.",
        ("undivided.layers.dha", "undivided.convert.dha", "undivided.training.fusion"), "partial", "reconstruction",
    ),
    System(
        4, "gna", "GNA",
        "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
        2025, "2504.16922", "local",
        "Adds a stride to window attention and predicts which windows waste no work on a GPU.",
        ("undivided.layers.gna", "undivided.layers.causal_neighborhood", "undivided.ops.neighborhood",
         "undivided.cost.gna"),
        "works", "official",
    ),
    System(
        5, "cca", "CCA / CCGQA",
        "Compressed Convolutional Attention: Efficient Attention in a Compressed Latent Space",
        2025, "2510.04476", "latent",
        "Runs the whole attention in a narrow latent: less prefill, training and cache.",
        ("undivided.layers.cca", "undivided.ops.conv"), "works", "official",
    ),
    System(
        6, "kdgqa", "KDGQA / DGQA / PGQA",
        "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention",
        2024, "2408.08454", "heads",
        "Gives more query heads to the key-value heads whose keys are larger, in vision GQA.",
        ("undivided.layers.kdgqa", "undivided.layers.pgqa", "undivided.layers.head_maps", "undivided.convert.kdgqa"),
        "works", "official",
    ),
    System(
        7, "gaam", "GAAM / DAAM",
        "Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple "
        "Modalities",
        2024, "2401.11143", "mixer",
        "Re-weights the features of a frozen encoder by learned Gaussian densities of their values.",
        ("undivided.layers.gaam", "undivided.ops.gaussian", "undivided.models.gat", "undivided.inspect.gaam"),
        "partial", "official",
    ),
    System(
        8, "agla", "AGLA",
        "AGLA: Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and "
        "Local Attention",
        2024, "2406.12718", "decoding",
        "Adds the logits of a prompt-relevant view of the image, so that fewer objects are invented.",
        ("undivided.decoding.agla",),
    ),
    System(
        9, "dcal", "DCAL",
        "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification",
        2022, "2205.02151", "vision",
        "Re-reads salient patches and mixes image pairs in training, to tell similar things apart.",
        ("undivided.layers.dcal", "undivided.models.vision.dcal"),
    ),
    System(
        10, "gst_vla", "GST-VLA",
        "GST-VLA: Structured Gaussian Spatial Tokens for 3D Depth-Aware Vision-Language-Action Models",
        2026, "2603.09079", "multimodal",
        "Turns depth and patches into 3-D Gaussian tokens for robot policies that need geometry.",
        ("undivided.models.multimodal.gst_vla",),
    ),
    System(
        11, "fna", "FNA",
        "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
        2024, "2403.04690", "local",
        "Fuses neighborhood attention in 1-D, 2-D and 3-D into one kernel with linear memory.",
        ("undivided.ops.neighborhood", "undivided.layers.gna"), "partial", "official",
    ),
    System(
        12, "ggem", "GGeM",
        "Group Generalized Mean Pooling for Vision Transformer", 2022, "2212.04114", "mixer",
        "Pools patch tokens with one learned power a channel group, in place of the class token.",
        ("undivided.layers.ggem", "undivided.ops.pooling"), "works", "reconstruction",
    ),
    System(
        13, "yq_lsa", "yq-LSA",
        "The Initialization Determines Whether In-Context Learning Is Gradient Descent",
        2025, "2512.04268", "theory",
        "Learns the query's first guess, so that linear attention equals one gradient step again.",
        ("undivided.layers.yq_lsa", "undivided.data.in_context"),
    ),
    System(
        14, "dma", "DMA", "Trainable Dynamic Mask Sparse Attention", 2025, "2508.02124", "sparse",
        "Learns from the values which keys a head keeps, the same in training and in decode.",
        ("undivided.layers.dma", "undivided.ops.dynamic_mask", "undivided.convert.dma"), "works", "official",
    ),
    System(
        15, "x_ecomla", "X-EcoMLA",
        "X-EcoMLA: Upcycling Pre-Trained Attention into MLA for Efficient and Extreme KV Compression",
        2025, "2503.11132", "latent",
        "Converts a trained model to MLA by weight SVD and heals it by distillation.",
        ("undivided.convert.x_ecomla", "undivided.layers.mla"), "partial", "official",
    ),
    System(
        16, "rcmha", "RCMHA",
        "RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling",
        2023, "2308.03429", "mixer",
        "Adds short causal convolutions to relative-position attention in a recurrent-memory model.",
        ("undivided.layers.rcmha", "undivided.models.transformer_xl", "undivided.ops.relative"), "works", "official",
    ),
    System(
        17, "transmla", "TransMLA", "TransMLA: Multi-head Latent Attention Is All You Need",
        2025, "2502.07864", "latent",
        "Converts GQA checkpoints to MLA by rotating keys and PCA, with little or no training.",
        ("undivided.convert.transmla",), "works", "official",
    ),
    System(
        18, "gsva", "GSVA", "GSVA: Generalized Segmentation via Multimodal Large Language Models",
        2023, "2312.10103", "multimodal",
        "Segments several described things at once and refuses those that are not in the image.",
        ("undivided.models.multimodal.gsva",),
    ),
    System(
        19, "moh", "MoH",
        "MoH: Multi-Head Attention as Mixture-of-Head Attention", 2024, "2410.11842", "heads",
        "Routes each token to a part of the heads, so that attention costs less at equal size.",
        ("undivided.layers.moh", "undivided.ops.routed", "undivided.convert.moh"), "works", "official",
    ),
    System(
        20, "fsa", "FSA",
        "Flash Sparse Attention: An Alternative Efficient Implementation of Native Sparse Attention Kernel",
        2025, "2508.18224", "sparse",
        "Turns the loops of native sparse attention round, for models with few query heads a group.",
        ("undivided.layers.nsa", "undivided.ops.compressed", "undivided.ops.selected", "undivided.convert.nsa",
         "undivided.cost.fsa"),
        "works", "paper",
    ),
    System(
        21, "sqa", "SQA",
        "Sparse Query Attention (SQA): A Computationally Efficient Attention Mechanism with Query Heads "
        "Reduction",
        2025, "2510.01817", "heads",
        "Keeps fewer query heads, so that training and prompt processing cost fewer operations.",
        ("undivided.layers.sqa", "undivided.convert.sqa", "undivided.cost.head_counts"), "works", "official",
    ),
    System(
        22, "hilo", "HiLo / LITv2",
        "Fast Vision Transformers with HiLo Attention", 2022, "2205.13213", "vision",
        "Splits heads into window detail and pooled context, for backbones fast on real devices.",
        ("undivided.layers.hilo", "undivided.models.vision.litv2"), "works", "official",
    ),
    System(
        23, "vig", "ViG", "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
        2024, "2405.18425", "linear",
        "Scans images in both directions with gated linear attention, for high resolution.",
        ("undivided.layers.vig", "undivided.models.vision.vig", "undivided.ops.scan"), "works", "official",
    ),
    System(
        24, "icl", "ICL regression",
        "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of "
        "Multi-Head Softmax Attention",
        2025, "2503.12734", "theory",
        "Shows which estimator softmax heads learn for in-context regression, and checks it.",
        ("undivided.layers.icl", "undivided.inspect.icl"),
    ),
    System(
        25, "gcog", "gCOG",
        "On the generalization capacity of neural networks during generic multimodal reasoning",
        2024, "2401.15030", "theory",
        "Generates visual questions whose test splits tell how an attention layout generalises.",
        ("undivided.data.gcog", "undivided.models.gcog"),
    ),
    System(
        26, "core_context", "CCA-Attention",
        "Core Context Aware Attention for Long Context Language Modeling",
        2024, "2412.12465", "sparse",
        "Summarises the far past in core tokens and reads the near past exactly, in trained LLMs.",
        ("undivided.layers.core_context", "undivided.ops.core_context", "undivided.convert.core_context"),
        "partial", "official",
    ),
    System(
        27, "tcpa", "TCPA", "Token Coordinated Prompt Attention is Needed for Visual Prompting",
        2025, "2505.02406", "vision",
        "Lets each token of a frozen ViT attend only to the learned prompts that match it.",
        ("undivided.layers.tcpa", "undivided.models.vision.tcpa"),
    ),
    System(
        28, "convit", "ConViT",
        "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
        2021, "2103.10697", "vision",
        "Starts heads as convolutions and lets a gate free each one, for ViTs with little data.",
        ("undivided.layers.convit", "undivided.models.vision.convit", "undivided.ops.positional"),
        "partial", "official",
    ),
    System(
        29, "hess", "HeSS", "HeSS: Head Sensitivity Score for Sparsity Redistribution in VGGT",
        2026, "2603.25336", "sparse",
        "Gives sensitive heads a larger share of a block-sparse budget, in multi-view transformers.",
        ("undivided.inspect.hess", "undivided.convert.hess"),
    ),
    System(
        30, "attention_editing", "Attention Editing",
        "Attention Editing: A Versatile Framework for Cross-Architecture Attention Conversion",
        2026, "2604.05688", "training",
        "Replaces the attention of a trained LLM by any other through staged distillation.",
        ("undivided.convert.attention_editing", "undivided.layers.gate_swa"), "partial", "reconstruction",
    ),
    System(
        31, "vhr", "VHR",
        "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
        2024, "2412.13949", "decoding",
        "Finds the heads that react to the image and scales them up, against invented objects.",
        ("undivided.decoding.vhr", "undivided.inspect.vhr"),
    ),
    System(
        32, "gla_gcn", "GLA-GCN",
        "GLA-GCN: Global-local Adaptive Graph Convolutional Network for 3D Human Pose Estimation from "
        "Monocular Video",
        2023, "2307.05853", "vision",
        "Lifts 2-D joints of a clip to a 3-D pose with a learned joint graph and per-joint heads.",
        ("undivided.models.pose.gla_gcn",),
    ),
    System(
        33, "fit", "FIT", "FIT: Far-reaching Interleaved Transformers", 2023, "2305.12689", "vision",
        "Interleaves local layers on token groups with global layers on latents, for huge inputs.",
        ("undivided.layers.fit", "undivided.models.fit"), "works", "official",
    ),
    System(
        34, "cogvla", "CogVLA",
        "CogVLA: Cognition-Aligned Vision-Language-Action Model via Instruction-Driven Routing & "
        "Sparsification",
        2025, "2508.21046", "multimodal",
        "Lets the instruction compress and prune vision tokens, to make robot policies fast.",
        ("undivided.models.multimodal.cogvla",),
    ),
    System(
        35, "dhsa", "DHSA",
        "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
        2025, "2510.24606", "sparse",
        "Predicts the needed keys from chunks of learned length, for long prompts on small devices.",
        ("undivided.layers.dhsa", "undivided.layers.boundaries", "undivided.ops.gathered", "undivided.convert.dhsa"),
        "partial", "official",
    ),
    System(
        36, "sla", "SLA",
        "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention",
        2025, "2509.24006", "sparse",
        "Attends exactly to a few blocks and linearly to the rest, in video and image diffusion.",
        (
            "undivided.layers.sla", "undivided.ops.sparse_linear", "undivided.ops.block_map",
            "undivided.convert.sla",
        ),
        "works", "official",
    ),
    System(
        37, "geometric_attention", "Geometric Attention",
        "Geometric Attention: A Regime-Explicit Operator Semantics for Transformer Attention",
        2026, "2601.11618", "theory",
        "Describes any attention by four declarations, so that mechanisms can be compared exactly.",
        ("undivided.spec", "undivided.ops.transport"), "works", "paper",
    ),
    System(
        38, "paint", "PAINT",
        "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model",
        2025, "2501.12206", "decoding",
        "Boosts the scores of selected image tokens in deep layers, to keep answers on the image.",
        ("undivided.decoding.paint",),
    ),
    System(
        39, "gcvit", "GC ViT", "Global Context Vision Transformers", 2022, "2206.09959", "vision",
        "Gives windows queries made from the whole image, in place of shifted windows.",
        ("undivided.layers.gcvit", "undivided.ops.grouped", "undivided.models.vision.gcvit"), "works", "official",
    ),
    System(
        40, "ela", "ELA", "ELA: Efficient Local Attention for Deep Convolutional Neural Networks",
        2024, "2403.01123", "mixer",
        "Gates the rows and columns of a CNN's feature maps to localise objects at little cost.",
        ("undivided.layers.ela", "undivided.ops.strips"), "works", "official",
    ),
    System(
        41, "lrgt", "LRGT", "Long-Range Grouping Transformer for Multi-View 3D Reconstruction",
        2023, "2308.08724", "vision",
        "Groups tokens that sample every view evenly, to turn unordered photographs into voxels.",
        ("undivided.layers.lrgt", "undivided.models.vision.lrgt"),
    ),
    System(
        42, "rhythm_rl", "Attention rhythm",
        "Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy "
        "Optimization",
        2025, "2510.13554", "training",
        "Reads planning and anchor tokens from attention maps and gives them more credit in RL.",
        ("undivided.training.rhythm_rl", "undivided.inspect.rhythm_rl"),
    ),
    System(
        43, "distca", "DistCA",
        "Efficient Long-context Language Model Training by Core Attention Disaggregation",
        2025, "2510.18121", "distributed",
        "Balances core attention over all GPUs as separate tasks, when documents differ in length.",
        ("undivided.distributed.distca", "undivided.cost.distca"),
    ),
    System(
        44, "saliency", "LVLMs-Saliency", "Hallucination Begins Where Saliency Drops",
        2026, "2601.20279", "decoding",
        "Rejects tokens of low attention-times-gradient and strengthens the latest outputs, in VLMs.",
        ("undivided.decoding.saliency", "undivided.inspect.saliency"),
    ),
    System(
        45, "gconet", "GCoNet+", "GCoNet+: A Stronger Group Collaborative Co-Salient Object Detector",
        2022, "2205.15469", "vision",
        "Masks the object that a group of images shares, by affinity across the group.",
        ("undivided.models.vision.gconet", "undivided.ops.affinity"),
    ),
    System(
        46, "gcav", "GCAV",
        "GCAV: A Global Concept Activation Vector Framework for Cross-Layer Consistency in Interpretability",
        2025, "2508.21197", "inspection",
        "Fuses the concept vectors of all layers, so that a concept's score agrees across layers.",
        ("undivided.inspect.gcav",),
    ),
    System(
        47, "tic", "TiC", "TiC: Exploring Vision Transformer in Convolution", 2023, "2310.04134", "local",
        "Makes attention slide like a convolution, so that one model takes images of any size.",
        ("undivided.layers.tic", "undivided.ops.msa_conv", "undivided.models.vision.tic"), "works", "reconstruction",
    ),
    System(
        48, "sparsifiner", "Sparsifiner",
        "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
        2023, "2303.13755", "sparse",
        "Predicts for each image, head and query which keys to attend, to make a trained ViT cheaper.",
        ("undivided.layers.sparsifiner", "undivided.ops.listed", "undivided.convert.sparsifiner"),
        "works", "official",
    ),
    System(
        49, "catanet", "CATANet",
        "CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution",
        2025, "2503.06896", "vision",
        "Groups similar pixels by shared learned centres, for small super-resolution models.",
        ("undivided.layers.catanet", "undivided.models.vision.catanet"),
    ),
    System(
        50, "cocova", "CoCoVa",
        "CoCoVa: Chain of Continuous Vision-Language Thought for Latent Space Reasoning",
        2025, "2511.02360", "multimodal",
        "Reasons in a short chain of vectors that look at the image again, for small VLMs.",
        ("undivided.models.multimodal.cocova",),
    ),
    System(
        51, "opera", "OPERA",
        "OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty and "
        "Retrospection-Allocation",
        2023, "2311.17911", "decoding",
        "Penalises beams that lean on summary tokens and rolls them back, for truer captions.",
        ("undivided.decoding.opera",),
    ),
    System(
        52, "attention_guard", "AttentionGuard",
        "Orchestrating Attention: Bringing Harmony to the 'Chaos' of Neurodivergent Learning States",
        2026, "2602.07865", "application",
        "Infers a learner's engagement from browser events and calms or enlivens the page.",
        ("undivided.apps.attention_guard",),
    ),
    System(
        53, "gui_aima", "GUI-AIMA",
        "GUI-AIMA: Aligning Intrinsic Multimodal Attention with a Context Anchor for GUI Grounding",
        2025, "2511.00810", "multimodal",
        "Reads the point to click from the model's own attention of one trained anchor token.",
        ("undivided.models.multimodal.gui_aima",),
    ),
    System(
        54, "rala", "RALA / RAVLT", "Breaking the Low-Rank Dilemma of Linear Attention",
        2024, "2411.07635", "linear",
        "Raises the rank of linear attention by token weights and modulation, for vision backbones.",
        ("undivided.layers.rala", "undivided.models.vision.ravlt", "undivided.ops.linear"), "works", "official",
    ),
)
# fmt: on

_BY_SLUG = {row.slug: row for row in SYSTEMS}
