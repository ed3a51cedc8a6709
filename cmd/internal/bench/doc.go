// Package bench measures messages between processes: Longhouse nodes, plain TCP
// connections and, given their jars, Apache Tribes nodes, all by the same
// protocol and on the same machine, so that ratios can be compared.
//
// Every node is a process of its own, an agent that is driven by lines on its
// standard input and answers with lines on its standard output:
//
//	                                          ready RECORD
//	join RECORD                               ok
//	run OPTION SIZE SENDERS MILLISECONDS      ran SENT FAILED START END P50 P90 P99 P999 MAX
//	count                                     count MESSAGES LAST
//	reset                                     ok
//
// A RECORD is a member record of package wire in hexadecimal digits; times are
// nanoseconds since 1970, latencies nanoseconds. Whatever goes wrong is
// answered with "error TEXT". An agent ends with its input.
//
// The package must not be imported by anything but cmd.
package bench
