// Package demo is the demo application: a page that shows the session, so that
// one can watch it survive a node, and a few plain requests for measurements. It
// is an ordinary net/http application that uses the session API and single
// sign-on; it imports core, core/session and valves/singlesignon only.
package demo
