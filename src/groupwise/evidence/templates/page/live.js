// Follow the server of `groupwise watch`.
function follow() {}
