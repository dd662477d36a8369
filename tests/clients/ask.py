"""Ask a service by the real clients of the Open Inference Protocol, and print what came as JSON.

Run by the interpreter of an environment that has these clients: `python ask.py URL MODEL`.
"""

import asyncio
import json
import sys
from typing import Any

import numpy as np
import tritonclient.http as triton
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

ROWS = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


def by_triton(url: str, model: str) -> dict[str, Any]:
    """Metadata, inference as JSON and as bytes, errors, and sixteen requests at once."""
    client = triton.InferenceServerClient(url.removeprefix("http://"), concurrency=16)

    def infer(*, as_bytes: bool, model: str = model, rows: Any = ROWS, **options: Any) -> Any:
        tensor = triton.InferInput("input", list(rows.shape), "FP32")
        tensor.set_data_from_numpy(rows, binary_data=as_bytes)
        output = triton.InferRequestedOutput("output", binary_data=as_bytes)
        return client.infer(model, [tensor], outputs=[output], request_id="7", **options)

    def error(**options: Any) -> str:
        try:
            infer(as_bytes=True, **options)
        except triton.InferenceServerException as raised:
            return str(raised)
        return "nothing was raised"

    answers = [infer(as_bytes=as_bytes) for as_bytes in (False, True)]
    compressed = infer(as_bytes=True, response_compression_algorithm="gzip")
    tensor = triton.InferInput("input", list(ROWS.shape), "FP32")
    tensor.set_data_from_numpy(ROWS)
    pending = [client.async_infer(model, [tensor]) for _ in range(160)]
    many = [each.get_result().as_numpy("output").tolist() for each in pending]
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(model),
        "other_ready": client.is_model_ready("other"),
        "server": client.get_server_metadata(),
        "metadata": client.get_model_metadata(model),
        "index": client.get_model_repository_index(),
        "outputs": [answer.as_numpy("output").tolist() for answer in (*answers, compressed)],
        "response": answers[1].get_response(),
        "named_version": infer(as_bytes=True, model_version="1").get_response()["model_version"],
        "alike": all(each == many[0] for each in many),
        "errors": [error(model="other"), error(model_version="99"), error(rows=ROWS[:, :2])],
    }


async def by_kserve(url: str, model: str) -> dict[str, Any]:
    """Health, and inference as JSON and as bytes."""
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    outputs = []
    for as_bytes in (False, True):
        tensor = InferInput("input", list(ROWS.shape), "FP32")
        tensor.set_data_from_numpy(ROWS, binary_data=as_bytes)
        answer = await client.infer(url, InferRequest(model, [tensor], request_id="7"), model_name=model)
        outputs.append(answer.outputs[0].as_numpy().tolist())
    try:
        await client.infer(url, InferRequest("other", [tensor]), model_name="other")
        error = "nothing was raised"
    except Exception as raised:  # whatever the client makes of a refusal
        error = str(raised)
    return {
        "live": await client.is_server_live(url),
        "ready": await client.is_server_ready(url),
        "model_ready": await client.is_model_ready(url, model),
        "outputs": outputs,
        "error": error,
    }


if __name__ == "__main__":
    url, model = sys.argv[1:]
    print(
        json.dumps(
            {"rows": ROWS.tolist(), "triton": by_triton(url, model), "kserve": asyncio.run(by_kserve(url, model))}
        )
    )
