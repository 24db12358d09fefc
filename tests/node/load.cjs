// Loads proto files and prints what they define: {name: null of a message or an enum, or the methods of a service}. A
// method is [request, response], with "stream " before what is streamed. Its argument is JSON: folders, names.
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const { folders, names } = JSON.parse(process.argv[2]);
const definition = loader.loadSync(names, { includeDirs: folders, keepCase: true });
grpc.loadPackageDefinition(definition);

function methods(service) {
  return Object.fromEntries(Object.entries(service).map(([name, method]) => [name, [
    (method.requestStream ? 'stream ' : '') + method.requestType.type.name,
    (method.responseStream ? 'stream ' : '') + method.responseType.type.name,
  ]]));
}

console.log(JSON.stringify(Object.fromEntries(
  Object.entries(definition).map(([name, type]) => [name, 'format' in type ? null : methods(type)]),
)));
