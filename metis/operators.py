from types import SimpleNamespace
def check_model(model):
    return SimpleNamespace(fatal=[], macs=0, share_on_chip=1.0)
