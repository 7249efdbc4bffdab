"""Backend openvino: GGUF files and OpenVINO folders on a CPU, with paged attention and continuous batching."""
