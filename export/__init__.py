"""From a torch model and a cut to a client bundle, and apart from it the server half."""
