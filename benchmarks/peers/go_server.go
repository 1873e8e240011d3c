// A benchmark server on Go's net package: a goroutine per connection, as one writes it in Go.
//
// Replies collect in the writer and are flushed when no whole frame is left in the reader.
package main

import (
	"bufio"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

const (
	headerSize = 4
	frameLimit = 64 << 20
	chunkSize  = 64 << 10
)

func handleRPC(conn net.Conn) {
	defer conn.Close()
	reader := bufio.NewReader(conn)
	writer := bufio.NewWriter(conn)
	var frame []byte
	for {
		header, err := reader.Peek(headerSize)
		if err != nil {
			return
		}
		size := headerSize + int(binary.BigEndian.Uint32(header))
		if size > frameLimit {
			return
		}
		if cap(frame) < size {
			frame = make([]byte, size)
		}
		frame = frame[:size]
		if _, err := io.ReadFull(reader, frame); err != nil {
			return
		}
		if _, err := writer.Write(frame); err != nil {
			return
		}
		if !frameBuffered(reader) && writer.Flush() != nil {
			return
		}
	}
}

func frameBuffered(reader *bufio.Reader) bool {
	if reader.Buffered() < headerSize {
		return false
	}
	header, _ := reader.Peek(headerSize)
	return reader.Buffered() >= headerSize+int(binary.BigEndian.Uint32(header))
}

func handleEcho(conn net.Conn) {
	defer conn.Close()
	buffer := make([]byte, chunkSize)
	for {
		n, err := conn.Read(buffer)
		if err != nil {
			return
		}
		if _, err := conn.Write(buffer[:n]); err != nil {
			return
		}
	}
}

func main() {
	flag.String("loop", "", "means nothing here")
	workload := flag.String("workload", "rpc", "rpc or echo")
	lifetime := flag.Int("lifetime", 0, "seconds after which the process ends; 0 = never")
	flag.Parse()
	if *lifetime > 0 {
		time.AfterFunc(time.Duration(*lifetime)*time.Second, func() { os.Exit(1) })
	}
	handle := handleRPC
	if *workload == "echo" {
		handle = handleEcho
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Printf("PORT %d\n", listener.Addr().(*net.TCPAddr).Port)
	for {
		conn, err := listener.Accept()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		go handle(conn)
	}
}
