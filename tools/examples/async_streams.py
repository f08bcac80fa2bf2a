"""Serve several people at once from asyncio: texts stream together, one caller is in a hurry, one gives up.

    python tools/examples/async_streams.py [MODEL.gguf]
"""

import asyncio
import sys

from ferrum import AsyncLLM, SamplingParams


async def tell(llm: AsyncLLM, name: str, message: str, **terms) -> str:
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=60)
    async with llm.stream_chat([{"role": "user", "content": message}], params, **terms) as stream:
        text = "".join([piece.text async for piece in stream])
    return f"{name}: {text.strip()[:60]}... [{stream.completion.finish_reason}]"


async def main() -> None:
    async with await AsyncLLM.load(*sys.argv[1:2]) as llm:
        animals = ["fox", "bear", "owl"]
        tasks = [asyncio.create_task(tell(llm, animal, f"Tell me a story about a {animal}.")) for animal in animals]
        tasks.append(asyncio.create_task(tell(llm, "in a hurry", "Tell me a story about a cat.", priority=-1, timeout=30)))
        gives_up = asyncio.create_task(tell(llm, "gives up", "Tell me a very long story."))
        await asyncio.sleep(0.01)
        gives_up.cancel()  # its place in the KV cache is free after the step that runs
        for told in await asyncio.gather(*tasks, gives_up, return_exceptions=True):
            print(repr(told) if isinstance(told, BaseException) else told)


if __name__ == "__main__":
    asyncio.run(main())
