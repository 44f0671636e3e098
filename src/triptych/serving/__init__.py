"""`triptych serve`: an exported model behind the Open Inference Protocol, version 2, and an upload of images."""
