def told(model, before, what, after):
    return repr(what)
def situation(model, state):
    return repr([ (n.process.machine.statistics(), n) for n in state.nodes])
