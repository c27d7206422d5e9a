"""PRISM's nodes for ComfyUI: a judge that reads the generator's hidden states, and early Best-of-N of seeds."""


async def comfy_entrypoint():
    """The pack's extension; ComfyUI's own modules are imported when it asks, and not before."""
    from .nodes import PrismExtension

    return PrismExtension()
