package bridge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core/config"
	pluginv1 "github.com/longhouse-go/longhouse/plugins/proto/v1"
)

// APIVersion is the version of the whole plugin protocol: control plane, frames
// and their meaning. Within one version there are only additions.
const APIVersion = 1

// ControlName is the name of the control plane in go-plugin's plugin set.
const ControlName = "longhouse"

// Names in the environment of a plugin process.
const (
	// EnvPrivateDir is the directory of one start of the process, for its
	// socket and temporary files. Who ends last removes it.
	EnvPrivateDir = "LONGHOUSE_PLUGIN_DIR"
	// EnvBaseDir is the node's working directory, see channel.Settings.BaseDir.
	EnvBaseDir = "LONGHOUSE_PLUGIN_BASE_DIR"
	// PrivateDirPrefix starts the name of every such directory.
	PrivateDirPrefix = "lhplugin-"
	// DataDescriptor is the number of the inherited data plane.
	DataDescriptor = 3
)

// Handshake tells people who start a plugin by hand what it is. It is no
// secret.
var Handshake = plugin.HandshakeConfig{
	ProtocolVersion:  APIVersion,
	MagicCookieKey:   "LONGHOUSE_PLUGIN",
	MagicCookieValue: "longhouse-plugin-api",
}

// Setup is what a node tells a plugin process before anything else.
type Setup struct {
	Kind, Name, Instance string
	Options              []byte
	Origin               string
	WorkDir              string
	LogLevel             string
	Descriptor           bool
	Generation           int
}

// Control is the control plane, as the node uses it and as plugins serve it.
type Control interface {
	// Configure makes the component. stream says that the data plane is that
	// of Data.
	Configure(ctx context.Context, s Setup) (stream bool, err error)
	Health(ctx context.Context) error
	Stats(ctx context.Context) ([]channel.Sample, error)
	// Shutdown ends the process soon after it has returned.
	Shutdown(ctx context.Context) error
}

// DataServer is implemented by a Control that serves the portable data plane.
// ServeData returns when the connection is not used any more.
type DataServer interface {
	ServeData(rw io.ReadWriteCloser) error
}

// Decoder returns the channel.Decode of options written at origin. No options
// leave all defaults.
func Decoder(options []byte, origin string) channel.Decode {
	return func(into any) error { return config.Decode(options, origin, into) }
}

// ControlPlugin is the control plane as a go-plugin plugin: Impl is served, or
// nil in the node.
type ControlPlugin struct {
	plugin.NetRPCUnsupportedPlugin
	Impl Control
}

// GRPCServer implements plugin.GRPCPlugin.
func (p *ControlPlugin) GRPCServer(_ *plugin.GRPCBroker, s *grpc.Server) error {
	pluginv1.RegisterControlServer(s, &controlServer{impl: p.Impl})
	return nil
}

// GRPCClient implements plugin.GRPCPlugin; it returns a *ControlClient.
func (p *ControlPlugin) GRPCClient(_ context.Context, _ *plugin.GRPCBroker, c *grpc.ClientConn) (any, error) {
	return &ControlClient{c: pluginv1.NewControlClient(c)}, nil
}

// ControlClient is the Control of a plugin process.
type ControlClient struct{ c pluginv1.ControlClient }

// Configure implements Control.
func (c *ControlClient) Configure(ctx context.Context, s Setup) (bool, error) {
	r, err := c.c.Configure(ctx, &pluginv1.ConfigureRequest{
		Kind: s.Kind, Name: s.Name, Instance: s.Instance,
		Options: s.Options, Origin: s.Origin, WorkDir: s.WorkDir, LogLevel: s.LogLevel,
		Inherited: s.Descriptor, Generation: int64(s.Generation),
	})
	if err != nil && ctx.Err() != nil {
		return false, fmt.Errorf("the plugin took too long to be configured: %w", ctx.Err())
	}
	return r.GetStream(), plain(err)
}

// Health implements Control.
func (c *ControlClient) Health(ctx context.Context) error {
	_, err := c.c.Health(ctx, &pluginv1.HealthRequest{})
	return plain(err)
}

// maxSamples bounds the samples that are taken from one plugin.
const maxSamples = 10_000

// Stats implements Control.
func (c *ControlClient) Stats(ctx context.Context) ([]channel.Sample, error) {
	r, err := c.c.Stats(ctx, &pluginv1.StatsRequest{})
	if err != nil {
		return nil, plain(err)
	}
	if len(r.Samples) > maxSamples {
		return nil, fmt.Errorf("bridge: %d samples are more than the bound of %d", len(r.Samples), maxSamples)
	}
	out := make([]channel.Sample, len(r.Samples))
	for i, s := range r.Samples {
		out[i] = channel.Sample{Name: s.Name, Help: s.Help, Labels: s.Labels, Counter: s.Counter, Value: s.Value}
		if h := s.Histogram; h != nil {
			out[i].Histogram = &channel.HistogramSample{Bounds: h.Bounds, Counts: h.Counts, Sum: h.Sum}
		}
	}
	return out, nil
}

// Shutdown implements Control.
func (c *ControlClient) Shutdown(ctx context.Context) error {
	_, err := c.c.Stop(ctx, &pluginv1.StopRequest{})
	return plain(err)
}

// Data opens the portable data plane; it ends with ctx.
func (c *ControlClient) Data(ctx context.Context) (io.ReadWriteCloser, error) {
	ctx, cancel := context.WithCancel(ctx)
	s, err := c.c.Data(ctx)
	if err != nil {
		cancel()
		return nil, plain(err)
	}
	return &streamConn{stream: s, end: cancel}, nil
}

// plain takes the text out of a gRPC error and gives the context errors their
// identity back.
func plain(err error) error {
	s, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	switch s.Code() {
	case codes.Canceled:
		return &remoteError{s.Message(), []error{context.Canceled}}
	case codes.DeadlineExceeded:
		return &remoteError{s.Message(), []error{context.DeadlineExceeded}}
	case codes.Unavailable:
		return &remoteError{s.Message(), []error{channel.ErrPluginDown}}
	}
	return errors.New(s.Message())
}

type controlServer struct {
	pluginv1.UnimplementedControlServer
	impl Control
}

func (s *controlServer) Configure(ctx context.Context, r *pluginv1.ConfigureRequest) (*pluginv1.ConfigureReply, error) {
	stream, err := s.impl.Configure(ctx, Setup{
		Kind: r.Kind, Name: r.Name, Instance: r.Instance,
		Options: r.Options, Origin: r.Origin, WorkDir: r.WorkDir, LogLevel: r.LogLevel,
		Descriptor: r.Inherited, Generation: int(r.Generation),
	})
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return &pluginv1.ConfigureReply{Stream: stream}, nil
}

func (s *controlServer) Health(ctx context.Context, _ *pluginv1.HealthRequest) (*pluginv1.HealthReply, error) {
	if err := s.impl.Health(ctx); err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	return &pluginv1.HealthReply{}, nil
}

func (s *controlServer) Stats(ctx context.Context, _ *pluginv1.StatsRequest) (*pluginv1.StatsReply, error) {
	samples, err := s.impl.Stats(ctx)
	if err != nil {
		return nil, status.Error(codes.Unknown, err.Error())
	}
	r := &pluginv1.StatsReply{Samples: make([]*pluginv1.Sample, len(samples))}
	for i, v := range samples {
		r.Samples[i] = &pluginv1.Sample{Name: v.Name, Help: v.Help, Labels: v.Labels, Counter: v.Counter, Value: v.Value}
		if h := v.Histogram; h != nil {
			r.Samples[i].Histogram = &pluginv1.Histogram{Bounds: h.Bounds, Counts: h.Counts, Sum: h.Sum}
		}
	}
	return r, nil
}

func (s *controlServer) Stop(ctx context.Context, _ *pluginv1.StopRequest) (*pluginv1.StopReply, error) {
	if err := s.impl.Shutdown(ctx); err != nil {
		return nil, status.Error(codes.Unknown, err.Error())
	}
	return &pluginv1.StopReply{}, nil
}

func (s *controlServer) Data(stream grpc.BidiStreamingServer[pluginv1.Chunk, pluginv1.Chunk]) error {
	d, ok := s.impl.(DataServer)
	if !ok {
		return status.Error(codes.Unimplemented, "this plugin uses the inherited descriptor")
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	closed := make(chan struct{})
	rw := &streamConn{stream: stream, end: func() { cancel(); close(closed) }}
	// gRPC ends a stream, and what is blocked in it, when its handler returns:
	// that is how the connection is closed from this side.
	served := make(chan error, 1)
	go func() { served <- d.ServeData(rw) }() // ends with the stream
	select {
	case err := <-served:
		return err
	case <-closed:
	case <-ctx.Done():
	}
	return nil
}

// chunkStream is either end of the Data stream.
type chunkStream interface {
	Send(*pluginv1.Chunk) error
	Recv() (*pluginv1.Chunk, error)
}

// streamConn makes a byte stream of the Data stream. It has one reader and one
// writer at a time.
type streamConn struct {
	stream chunkStream
	rest   []byte
	once   sync.Once
	end    func()
}

// Read implements io.Reader.
func (c *streamConn) Read(p []byte) (int, error) {
	for len(c.rest) == 0 {
		chunk, err := c.stream.Recv()
		if err != nil {
			if errors.Is(err, io.EOF) {
				return 0, io.EOF
			}
			return 0, plain(err)
		}
		c.rest = chunk.Data
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// Write implements io.Writer.
func (c *streamConn) Write(p []byte) (int, error) {
	// Send has encoded p when it returns.
	if err := c.stream.Send(&pluginv1.Chunk{Data: p}); err != nil {
		return 0, plain(err)
	}
	return len(p), nil
}

// Close implements io.Closer.
func (c *streamConn) Close() error {
	c.once.Do(c.end)
	return nil
}
