"""The pipelines of diffusers 0.42.1 without a row of facts, each with the reason; deprecated and modular ones are left
out."""

from __future__ import annotations

_REASONS: dict[str, str] = {
    "it samples a video chunk by chunk, and decodes each also where latents are asked for": """
        Cosmos2_5_TransferPipeline""",
    "in diffusers 0.42.1 it draws its control's latents from torch's global generator, which no seed sets": """
        AnimateDiffSparseControlNetPipeline HunyuanDiTControlNetPipeline QwenImageControlNetInpaintPipeline
        StableDiffusion3ControlNetInpaintingPipeline StableDiffusion3ControlNetPipeline""",
    "its guidance runs a third group of rows beside the conditional and the unconditional one": """
        AnimateDiffPAGPipeline HunyuanDiTPAGPipeline KolorsPAGPipeline PixArtSigmaPAGPipeline SanaPAGPipeline
        StableDiffusion3PAGImg2ImgPipeline StableDiffusion3PAGPipeline StableDiffusionControlNetPAGInpaintPipeline
        StableDiffusionControlNetPAGPipeline StableDiffusionInstructPix2PixPipeline StableDiffusionPAGImg2ImgPipeline
        StableDiffusionPAGInpaintPipeline StableDiffusionPAGPipeline StableDiffusionXLControlNetPAGImg2ImgPipeline
        StableDiffusionXLControlNetPAGPipeline StableDiffusionXLInstructPix2PixPipeline
        StableDiffusionXLPAGImg2ImgPipeline StableDiffusionXLPAGInpaintPipeline StableDiffusionXLPAGPipeline""",
    "its denoiser takes text, video and sound as one sequence without an axis for a batch": "Cosmos3OmniPipeline",
    "it denoises keyframes beside the video, as tokens behind the video's, which a clip's latents do not hold": """
        LTX2DFRPipeline""",
    "it refines what others make, tile by tile in time, each to its end": "LTX2DFRTemporalRefinePipeline",
    "what it decodes is linear light without an upper end (HDR), which is no picture from 0 to 1": "LTX2HDRPipeline",
    "it samples a video window by window, each to its end, and joins them after the loop": """
        LTXI2VLongMultiPromptPipeline""",
    "it samples a video window by window, and joins them and the image's latents after the loop": """
        HunyuanVideoFramepackPipeline""",
    "its latents change their size on the way": "HeliosPyramidPipeline",
    "its denoiser is told the next step's noise level too, which noisy latents by themselves do not have": """
        AnyFlowFARPipeline AnyFlowPipeline""",
    "its video begins with the given one, which its latents do not hold": """
        SkyReelsV2DiffusionForcingVideoToVideoPipeline""",
    "it samples no video or image from noise, but prepares, enlarges or decodes what others make": """
        Flux2KleinKVPipeline FluxPriorReduxPipeline Kandinsky6SRPipeline KandinskyPriorPipeline
        KandinskyV22PriorEmb2EmbPipeline KandinskyV22PriorPipeline LDMSuperResolutionPipeline LTX2LatentUpsamplePipeline
        LTX2VideoDiffusionDecodePipeline LTXLatentUpsamplePipeline MarigoldDepthPipeline MarigoldIntrinsicsPipeline
        MarigoldNormalsPipeline StableCascadePriorPipeline StableDiffusionLatentUpscalePipeline
        StableDiffusionUpscalePipeline HunyuanImageRefinerPipeline""",
    "its call fails in diffusers 0.42.1, whatever the arguments": "ChromaInpaintPipeline EasyAnimateControlPipeline",
    "in diffusers 0.42.1 it decodes without the VAE's shift, so that what it shows is not what it sampled": """
        StableDiffusion3InpaintPipeline""",
    "it samples pixels, text, molecules or shapes, and no latents of a VAE": """
        ConsistencyModelPipeline DDIMPipeline DDPMPipeline DiffusionGemmaPipeline IFImg2ImgPipeline
        IFImg2ImgSuperResolutionPipeline IFInpaintingPipeline IFInpaintingSuperResolutionPipeline IFPipeline
        IFSuperResolutionPipeline LLaDA2Pipeline PRXPixelPipeline RFD4ProteinaPipeline ShapEImg2ImgPipeline
        ShapEPipeline""",
    "its denoiser takes lists of lists of tensors in place of a batch": "ZImageOmniPipeline",
    "its timesteps are those before its schedule's shift, and its noise levels those after it": """
        CogView4ControlPipeline CogView4Pipeline GlmImagePipeline""",
    "its adapter's features reach the denoiser as a list of tensors, whose rows are not taken apart": """
        StableDiffusionAdapterPipeline StableDiffusionXLAdapterPipeline""",
    "its faces' embeddings come from packages of their own": "ConsisIDPipeline",
    "it never gives latents": """
        KandinskyCombinedPipeline KandinskyImg2ImgCombinedPipeline KandinskyImg2ImgPipeline
        KandinskyInpaintCombinedPipeline KandinskyInpaintPipeline KandinskyPipeline
        KandinskyV22ControlnetImg2ImgPipeline KandinskyV22ControlnetPipeline""",
    "its U-Net has no middle block, and its blocks have other widths than its configuration names": """
        Kandinsky3Img2ImgPipeline Kandinsky3Pipeline""",
    "its denoiser and VAE are a `decoder` and a `vqgan`, told what a prior made outside or inside the call": """
        StableCascadeCombinedPipeline StableCascadeDecoderPipeline""",
    "it takes a class in place of a prompt, and never gives latents": "DiTPipeline",
    "its VAE and text encoder are a `vqvae` and a `bert`, and it never gives latents": "LDMTextToImagePipeline",
    "it takes a subject and its picture beside the prompt, in lists, and never gives latents": """
        BlipDiffusionControlNetPipeline""",
    "a given image, or zeros in its place, stands beside the latents in their width, and it takes one prompt": """
        DreamLiteMobilePipeline DreamLitePipeline""",
    "its guidance comes from a second network, whose work would be neither saved nor counted": "Ideogram4Pipeline",
    "its latents hold the given images too, on an axis of their own": "JoyImageEditPipeline",
    "its latents are patches of all images in a row, the given ones among them": "JoyImageEditPlusPipeline",
    "it takes an image apart into several layers with transparency, which are no frames of a clip": """
        QwenImageLayeredPipeline""",
    "a language model within the denoiser reads the text as ids, and its guidance is never off": "OmniGenPipeline",
    "its image embedding is drawn by a prior within the call, anew for each seed": "StableUnCLIPPipeline",
    "it takes a task and pictures in a grid, and no `prompt`": """
        VisualClozeGenerationPipeline VisualClozePipeline""",
}


def _by_name() -> dict[str, str]:
    return {name: reason for reason, names in _REASONS.items() for name in names.split()}


UNSUPPORTED: dict[str, str] = _by_name()  # by pipeline, the reason
