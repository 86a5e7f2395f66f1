"""The Open Inference Protocol, over gRPC and HTTP: for clients of KServe and Triton."""
