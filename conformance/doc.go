// Package conformance tells whether a component keeps its promises. A suite of
// checks ([Builtin]) runs over a subject, under go test ([Run]) or in a program
// ([Main]), in every mode the subject can run in, and reports which profiles it
// conforms to. Every check comes with saboteurs, wrong subjects that it must
// catch ([TrySaboteurs]).
//
// The package also holds a simulated cluster: whole nodes (channel, membership,
// manager, session table) on a simulated network in virtual time, and the
// invariants that must hold when the network has healed ([NewCluster]).
//
// It imports channel, core and plugins; it must not import interceptors or
// valves (a test hands them in), nor core/container or fx.
package conformance
