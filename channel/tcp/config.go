package tcp

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/longhouse-go/longhouse/channel/wire"
)

// AutoAddress as ReceiverConfig.Address stands for the first IPv4 address of
// this machine that is not a loopback one, or the loopback address if there is
// no other.
const AutoAddress = "auto"

// ReceiverConfig configures a [Receiver].
type ReceiverConfig struct {
	// Address is the IP address to listen on and to announce, or "auto". The
	// unspecified address listens on all and announces what auto finds.
	Address string `yaml:"address"`
	// Port is the first port to try; 0 lets the system choose one.
	Port int `yaml:"port"`
	// AutoBind is how many ports are tried, Port being the first.
	AutoBind int `yaml:"auto_bind"`
	// MaxFrame bounds a whole message on the wire, in bytes. A larger one
	// closes its connection.
	MaxFrame int `yaml:"max_frame"`
	// MaxConnections bounds the open connections; further ones are closed.
	MaxConnections int `yaml:"max_connections"`
	// MaxBuffered bounds the bytes of unfinished messages of all connections
	// together; who would exceed it is disconnected.
	MaxBuffered int `yaml:"max_buffered"`
	// MaxOutstanding bounds the messages of one connection whose processing
	// was deferred and has not ended. At the bound the connection is not read.
	MaxOutstanding int `yaml:"max_outstanding"`
	// WindowBytes is how many bytes a node that understands it may have sent
	// on a connection that have not been processed: it gets credit for more as
	// messages end. 0 leaves it to the network's own flow control.
	WindowBytes int `yaml:"window_bytes"`
	// IdleTimeout closes connections on which nothing comes.
	IdleTimeout time.Duration `yaml:"idle_timeout"`
	// StallTimeout closes connections that do not begin with a frame within
	// this time, stop in the middle of one, do not take acknowledgements, or
	// stay at MaxOutstanding.
	StallTimeout time.Duration `yaml:"stall_timeout"`
}

// DefaultReceiverConfig listens on the loopback address, first port of 4000 to
// 4099 that is free.
func DefaultReceiverConfig() ReceiverConfig {
	return ReceiverConfig{
		Address: "127.0.0.1", Port: 4000, AutoBind: 100,
		MaxFrame: wire.DefaultMaxFrame, MaxConnections: 1024, MaxBuffered: 512 << 20, MaxOutstanding: 4096,
		WindowBytes: 8 << 20,
		IdleTimeout: 10 * time.Minute, StallTimeout: 30 * time.Second,
	}
}

// minFrame is the least useful bound of a frame: one with the largest sender
// record and an empty body.
const minFrame = wire.MaxMember + 1024

// Validate returns all problems, joined.
func (c ReceiverConfig) Validate() error {
	var errs []error
	if _, err := netip.ParseAddr(c.Address); err != nil && c.Address != AutoAddress {
		errs = append(errs, fmt.Errorf("tcp: address: %q is neither an IP address nor %q", c.Address, AutoAddress))
	}
	errs = append(errs,
		within("port", c.Port, 0, 65535), within("auto_bind", c.AutoBind, 1, 65536),
		within("max_frame", c.MaxFrame, minFrame, 1<<30), within("max_connections", c.MaxConnections, 1, 1<<20),
		atLeast("max_buffered", c.MaxBuffered, c.MaxFrame), within("max_outstanding", c.MaxOutstanding, 1, 1<<20),
		within("window_bytes", c.WindowBytes, 0, 1<<30),
		positive("idle_timeout", c.IdleTimeout), positive("stall_timeout", c.StallTimeout))
	return errors.Join(errs...)
}

// SenderConfig configures a [Sender].
type SenderConfig struct {
	// AckTimeout bounds the wait for the next acknowledgement of a
	// connection, and for a peer to take bytes. When it passes, everything
	// unacknowledged on the connection fails and the connection is closed.
	AckTimeout time.Duration `yaml:"ack_timeout"`
	// ConnectTimeout bounds connecting.
	ConnectTimeout time.Duration `yaml:"connect_timeout"`
	// Retries is how often a message that wants an acknowledgement is sent
	// again, byte for byte the same, on a new connection after its connection
	// was lost. Negative acknowledgements and time-outs are not retried.
	Retries int `yaml:"retries"`
	// Pool is how many connections go to one member that is not pipelined.
	Pool int `yaml:"pool"`
	// WindowMessages and WindowBytes bound what is accepted for one member
	// and not acknowledged, or not written if nobody waits for it. A message
	// larger than WindowBytes travels alone.
	WindowMessages int `yaml:"window_messages"`
	WindowBytes    int `yaml:"window_bytes"`
	// MaxFrame bounds a whole message on the wire, in bytes; larger ones are
	// refused. Receivers have a bound of their own.
	MaxFrame int `yaml:"max_frame"`
}

// DefaultSenderConfig returns the defaults: 3 s for acknowledgement and
// connecting, one retry, 25 connections, a window of 1024 messages and 8 MiB.
func DefaultSenderConfig() SenderConfig {
	return SenderConfig{
		AckTimeout: 3 * time.Second, ConnectTimeout: 3 * time.Second, Retries: 1, Pool: 25,
		WindowMessages: 1024, WindowBytes: 8 << 20, MaxFrame: wire.DefaultMaxFrame,
	}
}

// Validate returns all problems, joined.
func (c SenderConfig) Validate() error {
	return errors.Join(
		positive("ack_timeout", c.AckTimeout), positive("connect_timeout", c.ConnectTimeout),
		within("retries", c.Retries, 0, 100), within("pool", c.Pool, 1, 1024),
		within("window_messages", c.WindowMessages, 1, 1<<20), within("window_bytes", c.WindowBytes, 1, 1<<30),
		within("max_frame", c.MaxFrame, minFrame, 1<<30))
}

func within(field string, v, low, high int) error {
	if v < low || v > high {
		return fmt.Errorf("tcp: %s: %d is outside %d..%d", field, v, low, high)
	}
	return nil
}

func atLeast(field string, v, low int) error {
	if v < low {
		return fmt.Errorf("tcp: %s: %d is less than max_frame, %d", field, v, low)
	}
	return nil
}

func positive(field string, d time.Duration) error {
	if d < time.Millisecond {
		return fmt.Errorf("tcp: %s: %v is less than 1ms", field, d)
	}
	return nil
}
